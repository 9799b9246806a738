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
from ffnscope.cli.passes import Question, calibrate_and_score, compare_calibrations
from ffnscope.errors import ArtifactError, UsageError
from ffnscope.evaluate.compare import compare_plans
from ffnscope.ffn.load import LoadedModel
from ffnscope.io import read_plan, write_csv, write_json, write_scores, write_stats
from ffnscope.report.summary import correlation_summary, score_summary
from ffnscope.report.tables import print_results, print_stability, results_rows
from ffnscope.run.progress import Reporter
from ffnscope.run.stages import announce
from ffnscope.run.windows import describe_windows
from ffnscope.types import Scores

OUT = Console()
PART = "statistics.part.safetensors"
Metrics = Annotated[list[str], typer.Option("--metric", "-m", help="Metric; repeatable. See `ffnscope metrics`.")]


def score_command(
    context: typer.Context,
    model: opt.Model,
    metric: Metrics,
    out: opt.Out,
    text: opt.Text = "sotu",
    split: opt.Split = None,
    num_samples: opt.Samples = 64,
    max_length: opt.Length = 512,
    batch_size: opt.Batch = 4,
    seed: opt.Seed = 42,
    param: opt.Params = None,
    tracked: opt.Tracked = None,
    core_fraction: opt.CoreFraction = 0.01,
    reference: opt.Reference = None,
    repeats: Annotated[int, typer.Option(help="Calibrate with this many seeds and compare the rankings.")] = 1,
    repeat_text: Annotated[list[str] | None, typer.Option(help="Also compare with this text; repeatable.")] = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.Remote = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Score every channel: OUT/scores.safetensors, scores.json, statistics.safetensors. An interrupted pass goes on."""
    if not (out.is_dir() and {path.name for path in out.iterdir()} <= {PART}):
        refuse_existing(out, overwrite)
    inputs = opt.Inputs(opt.metric_params(param, metric), core_fraction, reference)
    opt.refuse_useless_core(context, inputs.params)
    choice = opt.TextChoice(text, split, num_samples, max_length, batch_size, seed)
    choices = choice.repeats(repeats, repeat_text or [])
    reporter = Reporter()
    loaded = opt.open_model(reporter, model, device, dtype, trust_remote_code)
    asked = inputs.question(loaded, tracked)
    texts = {label: one.calibration(loaded) for label, one in choices.items()}  # all, before a pass starts
    found = score_all(loaded, asked, choice, reporter, out, next(iter(texts.values()), None))
    write_json(out / "scores.json", {"metrics": score_summary(found), "rank_correlation": correlation_summary(found)})
    if texts:
        rows = stability_rows(compare_calibrations(asked, texts, PassOptions(batch_size=batch_size), reporter))
        write_json(out / "stability.json", {"rows": rows})
        write_csv(out / "stability.csv", rows)
        print_stability(rows, OUT)
    reporter.say(f"scores of {len(found)} metric(s) in {out}")


def eval_command(
    model: opt.Model,
    plan: Annotated[list[Path] | None, typer.Option(help="Evaluate this plan beside the dense model.")] = None,
    text: opt.Text = "sotu",
    split: opt.Split = None,
    num_samples: opt.Samples = 64,
    max_length: opt.Length = 512,
    batch_size: opt.Batch = 4,
    seed: opt.Seed = 42,
    out: Annotated[Path | None, typer.Option(help="Also write .json or .csv.")] = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.Remote = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Measure perplexity, and for plans KL to the dense model and top-1 agreement, on held-out text."""
    if out is not None:
        if out.suffix not in (".json", ".csv"):
            raise UsageError(f"--out {out} must end in .json or .csv.")
        refuse_existing(out, overwrite)
    plans = {file.stem: read_plan(file) for file in plan or ()}
    if len(plans) < len(plan or ()):
        raise UsageError("two plan files have the same name; rename one, so that rows can be told apart.")
    reporter = Reporter()
    loaded = opt.open_model(reporter, model, device, dtype, trust_remote_code)
    windows = opt.TextChoice(text, split, num_samples, max_length, batch_size, seed).held_out(loaded)
    per_batch = batch_size * windows.length * (1 + len(plans))
    with reporter.task("evaluate", "tokens") as update:
        rows = compare_plans(
            loaded.model,
            plans,
            windows,
            batch_size=batch_size,
            on_batch=lambda done, total: update(done * per_batch, total * per_batch),
        )
    print_results(rows, OUT)
    if out is not None:
        flat = results_rows(rows)
        write_json(out, {"rows": flat}) if out.suffix == ".json" else write_csv(out, flat)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise ArtifactError when an output exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise ArtifactError(f"{path} already exists. Choose another --out, or pass --overwrite to replace it.")


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
    facts = {"model": weights_hash(loaded.model), "calibration": describe_windows(windows)}
    if asked.reference is not None:
        facts["reference"] = weights_hash(asked.reference)
    core = asked.rule.count or round(asked.rule.fraction * max(s.d_ff for s in asked.sites))
    announce(reporter, asked.sites, required_statistics(asked.params), core)
    with reporter.task("calibrate", "tokens") as update:
        stats, found = calibrate_and_score(asked, windows, options, update, facts)
    if folder:
        write_stats(folder / "statistics.safetensors", stats.values(), facts)
        write_scores(folder / "scores.safetensors", found.values(), facts)
    return found
