"""The commands score and eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ffnscope.analyze.stability import stability_rows
from ffnscope.calibrate.collect import PassOptions, required_statistics, weights_hash
from ffnscope.calibrate.windows import Windows
from ffnscope.cli import options as opt
from ffnscope.cli.files import Out, Overwrite, check_output, check_table, read_plans, write_table
from ffnscope.cli.groups import grouped
from ffnscope.cli.passes import Question, calibrate_and_score, compare_calibrations
from ffnscope.errors import ArtifactError
from ffnscope.ffn.load import LoadedModel
from ffnscope.io import write_csv, write_json, write_scores, write_stats
from ffnscope.report.summary import correlation_summary, score_summary
from ffnscope.report.tables import print_results, print_stability, results_rows
from ffnscope.run.progress import Reporter
from ffnscope.run.steps import announce, compare_with_dense, discard_damaged
from ffnscope.run.windows import describe_windows
from ffnscope.scoring import naming_weights
from ffnscope.types import Scores

OUT = Console()
PART = "statistics.part.safetensors"
Metrics = Annotated[list[str], typer.Option("--metric", "-m", help="Metric; repeatable. See `ffnscope metrics`.")]


@grouped
def score_command(
    *,
    context: typer.Context,
    model: opt.Model,
    metric: Metrics,
    out: Out,
    text: opt.TextChoice,
    needs: opt.MetricOptions,
    tracked: opt.Tracked = None,
    repeats: Annotated[int, typer.Option(help="Calibrate with this many seeds and compare the rankings.")] = 1,
    repeat_text: Annotated[list[str] | None, typer.Option(help="Also compare with this text; repeatable.")] = None,
    loading: opt.Loading,
    overwrite: Overwrite = False,
) -> None:
    """Score every channel: OUT/scores.safetensors, scores.json, statistics.safetensors. An interrupted pass goes on."""
    if out.is_file():
        raise ArtifactError(f"{out} is a file; --out must be a folder.")
    if not (out.is_dir() and {path.name for path in out.iterdir()} <= {PART}):
        check_output(out, overwrite)
    inputs = needs.inputs(context, metric)
    choices = text.repeats(repeats, repeat_text or [])
    for one in (text, *choices.values()):
        one.check_calibration()
    reporter = Reporter()
    loaded = loading.open(reporter, model)
    asked = inputs.question(loaded, tracked)
    texts = {label: one.calibration(loaded) for label, one in choices.items()}  # all, before a pass starts
    found = score_all(loaded, asked, text, reporter, out, next(iter(texts.values()), None))
    write_json(out / "scores.json", {"metrics": score_summary(found), "rank_correlation": correlation_summary(found)})
    if texts:
        rows = stability_rows(compare_calibrations(asked, texts, PassOptions(batch_size=text.batch_size), reporter))
        write_json(out / "stability.json", {"rows": rows})
        write_csv(out / "stability.csv", rows)
        print_stability(rows, OUT)
    reporter.say(f"scores of {len(found)} metric(s) in {out}")


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

    ``windows`` are those of the choice, where they are cut already.
    """
    windows = choice.calibration(loaded) if windows is None else windows
    options = PassOptions(batch_size=choice.batch_size, checkpoint=folder / PART if folder else None)
    facts = {"model": weights_hash(loaded.model), **loaded.facts, "calibration": describe_windows(windows)}
    if asked.reference is not None:
        facts["reference"] = weights_hash(asked.reference)
    core = asked.rule.count or round(asked.rule.fraction * max(s.d_ff for s in asked.sites))
    announce(reporter, asked.sites, required_statistics(asked.params), core)
    if folder:
        discard_damaged(reporter, folder / PART)
    with reporter.task("calibrate", "tokens") as update, naming_weights(loaded.model):
        stats, found = calibrate_and_score(asked, windows, options, update, facts)
    if folder:
        write_stats(folder / "statistics.safetensors", stats.values(), facts)
        write_scores(folder / "scores.safetensors", found.values(), facts)
    return found
