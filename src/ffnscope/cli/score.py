"""The command score: every channel by metrics, once or over several calibrations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ffnscope.analyze.stability import stability_rows
from ffnscope.calibrate.collect import PassOptions, weights_hash
from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT, UNFINISHED, score_all
from ffnscope.cli.files import Out, Overwrite, check_folder_output, tell_changes, unfinished
from ffnscope.cli.groups import grouped
from ffnscope.cli.passes import compare_calibrations
from ffnscope.cli.score_estimate import print_score_estimate
from ffnscope.ffn.streamed import wait_in
from ffnscope.io import write_csv, write_json
from ffnscope.report.stability_table import print_stability
from ffnscope.report.summary import correlation_summary, score_summary
from ffnscope.run.machine import library_bytes
from ffnscope.run.progress import Reporter
from ffnscope.saving import writing

Metrics = Annotated[list[str], typer.Option("--metric", "-m", help="Metric; repeatable. See `ffnscope metrics`.")]
Repeats = Annotated[int, typer.Option(help="Calibrate with this many seeds, --seed and the next ones, and compare.")]
RepeatText = Annotated[list[str] | None, typer.Option(help="Also compare with this text; repeatable.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would run, and how long it would take.")]


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
    repeats: Repeats = 1,
    repeat_text: RepeatText = None,
    loading: opt.Loading,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Score every channel: OUT/scores.safetensors, scores.json, statistics.safetensors. An interrupted call goes on.

    With several calibrations also OUT/stability.json and stability.csv: how far their rankings agree, with 95 %
    intervals over documents for every metric. Metrics that draw random numbers draw others in each calibration (seeds
    --seed, --seed + 1, ...), unless --param fixes their seed.
    """
    check_folder_output(out, overwrite, UNFINISHED)
    inputs = needs.inputs(context, metric, text.seed)
    choices = text.repeats(repeats, repeat_text or [])
    for one in (text, *choices.values()):
        one.check_calibration()
    reporter = Reporter()
    libraries = library_bytes() if dry_run else 0  # before the model is loaded
    loaded = loading.open(reporter, model, only_estimate=dry_run)
    asked = inputs.question(loaded, tracked)
    windows = text.calibration(loaded)
    questions = [replace(asked, params=needs.params(metric, text.seed + i)) for i in range(len(choices))]
    texts = {  # all, before a pass starts
        label: (question, one.calibration(loaded))
        for question, (label, one) in zip(questions, choices.items(), strict=True)
    }
    options = PassOptions(batch_size=text.batch_size)
    if dry_run:
        print_score_estimate(asked, windows, texts, options, loaded, libraries, OUT)
        return
    with unfinished(out / UNFINISHED) as part:
        wait_in(loaded.model, part)
        known = weights_hash(loaded.model)
        hashes = {"the model": known, "the calibration text": windows.hash}
        hashes |= {f"the text of {label}": one.hash for label, (_, one) in texts.items()}
        tell_changes(part, hashes, reporter)
        found = score_all(loaded, asked, text, reporter, out, windows, known)
        summary = {"metrics": score_summary(found), "rank_correlation": correlation_summary(found)}
        write_json(out / "scores.json", summary)
        rows = stability_rows(compare_calibrations(texts, options, reporter, part)) if texts else []
        _write_stability(out, rows)
    if rows:
        print_stability(rows, OUT)
    reporter.say(f"scores of {len(found)} metric(s) in {out}")


def _write_stability(out: Path, rows: list[dict[str, Any]]) -> None:
    """Write the comparison, or delete the one of scores that were replaced."""
    paths = out / "stability.json", out / "stability.csv"
    if rows:
        write_json(paths[0], {"rows": rows})
        write_csv(paths[1], rows)
        return
    for path in paths:
        with writing(path):
            path.unlink(missing_ok=True)
