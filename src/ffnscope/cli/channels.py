"""The commands score and eval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ffnscope.analyze.levels import CoreRule, calibrate_all
from ffnscope.analyze.stability import per_document, stability, stability_rows
from ffnscope.calibrate.collect import PassOptions, weights_hash
from ffnscope.cli import options as opt
from ffnscope.errors import ArtifactError, UsageError
from ffnscope.evaluate.compare import compare_plans
from ffnscope.ffn.load import LoadedModel
from ffnscope.ffn.sites import find_sites
from ffnscope.io import read_plan, write_csv, write_json, write_scores, write_stats
from ffnscope.report.summary import correlation_summary, score_summary
from ffnscope.report.tables import print_results, print_stability, results_rows
from ffnscope.run.progress import Reporter
from ffnscope.run.windows import describe_windows
from ffnscope.scoring import score
from ffnscope.types import FFNSite, Scores

OUT = Console()
PART = "statistics.part.safetensors"
Metrics = Annotated[list[str], typer.Option("--metric", "-m", help="Metric; repeatable. See `ffnscope metrics`.")]
Tracked = Annotated[list[str] | None, typer.Option("--tracked", help="Pattern of layers to score; repeatable.")]


def score_command(
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
    tracked: Tracked = None,
    core_fraction: opt.CoreFraction = 0.01,
    reference: opt.Reference = None,
    repeats: Annotated[int, typer.Option(help="Calibrate with this many seeds and compare the rankings.")] = 1,
    repeat_text: Annotated[list[str] | None, typer.Option(help="Also compare with this text; repeatable.")] = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.Remote = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Score every channel: OUT/scores.safetensors, scores.json and statistics.safetensors. Goes on after a stop."""
    if not (out.is_dir() and {path.name for path in out.iterdir()} <= {PART}):
        refuse_existing(out, overwrite)
    params = opt.metric_params(param, metric)
    reporter = Reporter()
    loaded = opt.open_model(reporter, model, device, dtype, trust_remote_code)
    choice = opt.TextChoice(text, split, num_samples, max_length, batch_size, seed)
    sites = find_sites(loaded.model, tracked)
    extras = opt.Extras(core_fraction, opt.open_reference(reference, loaded.source) if reference else None)
    found = score_all(loaded, sites, params, choice, reporter, out, extras)
    write_json(out / "scores.json", {"metrics": score_summary(found), "rank_correlation": correlation_summary(found)})
    if repeats > 1 or repeat_text:
        write_stability(loaded, sites, params, choice.repeats(repeats, repeat_text or []), reporter, out)
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
    sites: list[FFNSite],
    params: Mapping[str, Mapping[str, Any]],
    choice: opt.TextChoice,
    reporter: Reporter,
    folder: Path | None = None,
    extras: opt.Extras | None = None,
) -> dict[str, Scores]:
    """Calibrate for all metrics (once, or twice when one needs the core) and score; with a folder, also write both."""
    extras = extras or opt.Extras()
    windows = choice.calibration(loaded)
    options = PassOptions(batch_size=choice.batch_size, checkpoint=folder / PART if folder else None)
    rule = CoreRule(fraction=extras.core_fraction)
    with reporter.task("calibrate", "tokens") as update:
        stats, core = calibrate_all(
            loaded.model, windows, params, sites=sites, options=options, rule=rule, on_batch=update
        )
    facts = {"model": weights_hash(loaded.model), "calibration": describe_windows(windows)}
    given: dict[str, Any] = {"facts": facts, "core": core, "reference": extras.reference}
    found = {m: score(loaded.model, stats, m, **given, **p) for m, p in params.items()}
    if folder:
        write_stats(folder / "statistics.safetensors", stats.values(), facts)
        write_scores(folder / "scores.safetensors", found.values(), facts)
    return found


def write_stability(
    loaded: LoadedModel,
    sites: list[FFNSite],
    params: Mapping[str, Mapping[str, Any]],
    choices: Mapping[str, opt.TextChoice],
    reporter: Reporter,
    folder: Path,
) -> None:
    """Calibrate on every seed and text apart, and compare the rankings: ``stability.json`` and ``.csv``."""
    calibrations: dict[str, Any] = {}
    for label, choice in choices.items():
        windows = choice.calibration(loaded)
        options = PassOptions(batch_size=choice.batch_size)
        with reporter.task(f"calibrate {label}", "tokens") as update:
            calibrations[label] = per_document(loaded.model, windows, params, sites, options, update)
    with reporter.task("bootstrap", "metrics"):
        rows = stability_rows(stability(loaded.model, calibrations, params))
    write_json(folder / "stability.json", {"rows": rows})
    write_csv(folder / "stability.csv", rows)
    print_stability(rows, OUT)
