"""The command rank: channels in the order of a metric."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT, score_all
from ffnscope.cli.files import Overwrite, check_table, read_metric, write_table
from ffnscope.cli.groups import grouped, option_names
from ffnscope.cli.validate import ValidateOptions, validate_command
from ffnscope.errors import UsageError
from ffnscope.ffn.sites import select_sites
from ffnscope.report.ranking import ranking
from ffnscope.run.progress import Reporter
from ffnscope.types import Scores

DEFAULT = "scar_loss_proxy"
_USELESS = option_names(opt.TextChoice, opt.MetricOptions, opt.Loading)
"""Options that have no meaning beside --scores."""


@grouped
def rank_command(
    *,
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Model to score; leave out with --scores.")] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metric", "-m", help="Metric that ranks, scar_loss_proxy without; with --validate any."),
    ] = None,
    scores: Annotated[Path | None, typer.Option(help="Rank these scores instead of calibrating.")] = None,
    top: Annotated[int, typer.Option(help="Rows to print (--out writes all).")] = 20,
    lowest: Annotated[bool, typer.Option("--lowest", help="Start with the least important channels.")] = False,
    tracked: opt.Tracked = None,
    out: Annotated[Path | None, typer.Option(help="Write all rows: .csv or .json; a folder with --validate.")] = None,
    text: opt.TextChoice,
    needs: opt.MetricOptions,
    loading: opt.Loading,
    checks: ValidateOptions,
    overwrite: Overwrite = False,
) -> None:
    """Score channels with a metric and list them in its order, over all layers or some (--tracked).

    With --validate, measure instead which metrics rank the channels of this model well: OUT/validation.json, .csv, .md.
    """
    if checks.validate:
        opt.refuse_useless(context, "--validate, which scores a model by several metrics", ("scores", "top", "lowest"))
        chosen: Any = {"tracked": tracked, "text": text, "needs": needs, "checks": checks, "loading": loading}
        validate_command(context, model, metrics, out, **chosen, overwrite=overwrite)
        return
    opt.refuse_useless(context, "a ranking alone, without --validate", ValidateOptions.names())
    metric = _one_metric(metrics)
    if (model is None) == (scores is None):
        raise UsageError("give either a model to score, or --scores FILE.")
    check_table(out, overwrite)
    if top < 1:
        raise UsageError(f"--top must be at least 1 row; got {top}.")
    if scores is not None:
        opt.refuse_useless(context, f"--scores {scores}, which already decides that", _USELESS)
        found = _some_sites(read_metric(scores, metric)[0], tracked)
    else:
        reporter = Reporter()
        inputs = needs.inputs(context, [metric], text.seed)
        text.check_calibration()
        loaded = loading.open(reporter, model or "")
        (found,) = score_all(loaded, inputs.question(loaded, tracked), text, reporter).values()
    _print(metric, ranking(found, top, lowest=lowest))
    if out is not None:
        rows = ranking(found, lowest=lowest)
        write_table(out, rows, metric=metric)


def _one_metric(metrics: list[str] | None) -> str:
    if metrics and len(metrics) > 1:
        raise UsageError(
            f"rank lists the channels by one metric; got {', '.join(metrics)}. Compare them by --validate."
        )
    return metrics[0] if metrics else DEFAULT


def _some_sites(found: Scores, tracked: list[str] | None) -> Scores:
    if tracked is None:
        return found
    return Scores(found.metric, {s: found.values[s] for s in select_sites(found.sites, tracked)}, found.facts)


def _print(metric: str, rows: list[dict[str, Any]]) -> None:
    table = Table("rank", "layer", "channel", metric, "above (of its FFN)", "site")
    for row in rows:
        numbers = (row["rank"], row["layer"], row["channel"])
        table.add_row(*map(str, numbers), f"{row['value']:.4g}", f"{row['share_below']:.1%}", Text(row["site"]))
    OUT.print(table)
