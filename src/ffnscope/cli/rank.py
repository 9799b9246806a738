"""The command rank: channels in the order of a metric."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT, refuse_existing, score_all
from ffnscope.errors import UsageError
from ffnscope.ffn.sites import select_sites
from ffnscope.io import read_scores, write_csv, write_json
from ffnscope.report.ranking import ranking
from ffnscope.run.progress import Reporter
from ffnscope.types import Scores

_USELESS = (
    *("text", "split", "num_samples", "max_length", "batch_size", "seed", "param", "core_fraction", "reference"),
    *("device", "dtype", "trust_remote_code"),
)
"""Options that have no meaning beside --scores."""


def rank_command(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Model to score; leave out with --scores.")] = None,
    metric: Annotated[str, typer.Option("--metric", "-m", help="Metric that ranks the channels.")] = "scar_loss_proxy",
    scores: Annotated[Path | None, typer.Option(help="Rank these scores instead of calibrating.")] = None,
    top: Annotated[int, typer.Option(help="Rows to print (--out writes all).")] = 20,
    lowest: Annotated[bool, typer.Option("--lowest", help="Start with the least important channels.")] = False,
    tracked: opt.Tracked = None,
    out: Annotated[Path | None, typer.Option(help="Write all rows: .csv or .json.")] = None,
    text: opt.Text = "sotu",
    split: opt.Split = None,
    num_samples: opt.Samples = 64,
    max_length: opt.Length = 512,
    batch_size: opt.Batch = 4,
    seed: opt.Seed = 42,
    param: opt.Params = None,
    core_fraction: opt.CoreFraction = 0.01,
    reference: opt.Reference = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.Remote = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Score channels with a metric and list them in its order, over all layers or some (--tracked)."""
    if (model is None) == (scores is None):
        raise UsageError("give either a model to score, or --scores FILE.")
    if out is not None:
        if out.suffix not in (".csv", ".json"):
            raise UsageError(f"--out {out} must end in .csv or .json.")
        refuse_existing(out, overwrite)
    if top < 1:
        raise UsageError(f"--top must be at least 1 row; got {top}.")
    if scores is not None:
        opt.refuse_useless(context, "scores", scores, _USELESS)
        found = _read(scores, metric, tracked)
    else:
        reporter = Reporter()
        inputs = opt.Inputs(opt.metric_params(param, [metric]), core_fraction, reference)
        opt.refuse_useless_core(context, inputs.params)
        loaded = opt.open_model(reporter, model or "", device, dtype, trust_remote_code)
        choice = opt.TextChoice(text, split, num_samples, max_length, batch_size, seed)
        (found,) = score_all(loaded, inputs.question(loaded, tracked), choice, reporter).values()
    _print(metric, ranking(found, top, lowest=lowest))
    if out is not None:
        rows = ranking(found, lowest=lowest)
        write_json(out, {"metric": metric, "rows": rows}) if out.suffix == ".json" else write_csv(out, rows)


def _read(path: Path, metric: str, tracked: list[str] | None) -> Scores:
    found, _ = read_scores(path)
    if metric not in found:
        raise UsageError(f"{path} holds scores of {', '.join(found)}; {metric!r} is not among them.")
    one = found[metric]
    if tracked is None:
        return one
    return Scores(metric, {s: one.values[s] for s in select_sites(one.sites, tracked)}, one.facts)


def _print(metric: str, rows: list[dict[str, Any]]) -> None:
    table = Table("rank", "layer", "channel", metric, "above (of its FFN)", "site")
    for row in rows:
        numbers = (row["rank"], row["layer"], row["channel"])
        table.add_row(*map(str, numbers), f"{row['value']:.4g}", f"{row['share_below']:.1%}", Text(row["site"]))
    OUT.print(table)
