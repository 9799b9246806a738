"""The command eval, and what score, rank and prune share: calibrate and score."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ffnscope.analyze.levels import needs_core
from ffnscope.analyze.memory import calibration_bytes
from ffnscope.analyze.question import Question
from ffnscope.calibrate.collect import PassOptions, weights_hash
from ffnscope.calibrate.windows import Windows
from ffnscope.cli import options as opt
from ffnscope.cli.files import Overwrite, check_table, read_plans, write_table
from ffnscope.cli.groups import grouped
from ffnscope.cli.passes import calibrate_and_score
from ffnscope.ffn.load import LoadedModel
from ffnscope.io import write_scores, write_stats
from ffnscope.report.tables import print_results, results_rows
from ffnscope.run.progress import Reporter
from ffnscope.run.steps import announce, compare_with_dense, discard_damaged
from ffnscope.run.windows import describe_windows
from ffnscope.scoring import naming_weights
from ffnscope.types import Scores

OUT = Console()
UNFINISHED = "score.part"
"""Folder in an output that is not finished: what its passes have found so far."""


@grouped
def eval_command(
    *,
    model: opt.Model,
    plan: Annotated[list[Path] | None, typer.Option(help="Evaluate this plan beside the dense model.")] = None,
    text: opt.TextChoice,
    out: Annotated[Path | None, typer.Option(help="Also write .json or .csv.")] = None,
    loading: opt.Loading,
    overwrite: Overwrite = False,
) -> None:
    """Measure perplexity, and for plans KL to the dense model and top-1 agreement, on held-out text."""
    check_table(out, overwrite)
    plans = read_plans(plan or ())
    text.check_held_out()
    reporter = Reporter()
    loaded = loading.open(reporter, model)
    rows = compare_with_dense(reporter, loaded.model, plans, text.held_out(loaded), text.batch_size)
    print_results(rows, OUT)
    if out is not None:
        write_table(out, results_rows(rows))


def score_all(
    loaded: LoadedModel,
    asked: Question,
    choice: opt.TextChoice,
    reporter: Reporter,
    folder: Path | None = None,
    windows: Windows | None = None,
) -> dict[str, Scores]:
    """Calibrate for all metrics (once, or twice when one needs the core) and score; with a folder, also write both.

    ``windows`` are those of the choice, where they are cut already. The passes leave their sums in the folder's
    `UNFINISHED`, which the caller removes once all else is done.
    """
    windows = choice.calibration(loaded) if windows is None else windows
    part = folder / UNFINISHED / "calibrate.safetensors" if folder else None
    options = PassOptions(batch_size=choice.batch_size, checkpoint=part, keep_checkpoint=True)
    facts: dict[str, Any] = {"model": weights_hash(loaded.model), **loaded.facts}
    facts |= {"calibration": describe_windows(windows)}
    facts["batch_size"] = choice.batch_size
    if needs_core(asked.params):
        facts["core"] = asdict(asked.rule)
    if asked.reference is not None:
        facts["reference"] = weights_hash(asked.reference)
    given: Any = {"sites": asked.sites, "rule": asked.rule, "options": options}
    announce(reporter, calibration_bytes(asked.model, windows, asked.params, **given))
    for path in part.parent.glob(f"*{part.name}") if part else ():
        discard_damaged(reporter, path)
    with reporter.task("calibrate", "tokens") as update, naming_weights(loaded.model):
        stats, found = calibrate_and_score(asked, windows, options, update, facts)
    if folder:
        write_stats(folder / "statistics.safetensors", stats.values(), facts)
        write_scores(folder / "scores.safetensors", found.values(), facts)
    return found
