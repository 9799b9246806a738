"""The commands that work on channels: score, prune, eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ffnscope.apply.export import prune_, save_model
from ffnscope.calibrate.collect import PassOptions, calibrate, weights_hash
from ffnscope.cli import options as opt
from ffnscope.errors import ArtifactError, UsageError
from ffnscope.evaluate.compare import compare_plans
from ffnscope.ffn.load import LoadedModel
from ffnscope.ffn.sites import find_sites
from ffnscope.io import read_plan, read_scores, write_csv, write_json, write_scores, write_stats
from ffnscope.plan.build import build_plan, top_core
from ffnscope.report.summary import correlation_summary, score_summary
from ffnscope.report.tables import print_results, results_rows
from ffnscope.run.progress import Reporter
from ffnscope.run.stages import describe_windows
from ffnscope.run.texts import held_out_split
from ffnscope.scoring import score
from ffnscope.types import Budget, FFNSite, PruningPlan, Scores

OUT = Console()
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
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.Remote = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Score every channel: OUT/scores.safetensors, scores.json and statistics.safetensors."""
    refuse_existing(out, overwrite)
    params = opt.metric_params(param, metric)
    reporter = Reporter()
    loaded = opt.open_model(reporter, model, device, dtype, trust_remote_code)
    choice = opt.TextChoice(text, split, num_samples, max_length, batch_size, seed)
    sites = find_sites(loaded.model, tracked)
    found = _score_all(loaded, sites, params, choice, reporter, out)
    write_json(out / "scores.json", {"metrics": score_summary(found), "rank_correlation": correlation_summary(found)})
    reporter.say(f"scores of {len(found)} metric(s) in {out}")


def prune_command(
    model: opt.Model,
    out: opt.Out,
    metric: Annotated[str, typer.Option("--metric", "-m", help="Metric that ranks the channels.")] = "scar_loss_proxy",
    sparsity: Annotated[float | None, typer.Option(help="Fraction of channels to remove, in [0, 1).")] = None,
    plan: Annotated[Path | None, typer.Option(help="Apply this plan instead of making one.")] = None,
    scores: Annotated[Path | None, typer.Option(help="Use these scores instead of calibrating.")] = None,
    allocator: Annotated[str, typer.Option(help="local (same sparsity everywhere) or global.")] = "local",
    multiple_of: Annotated[int, typer.Option(help="Kept widths are multiples of this.")] = 1,
    core_fraction: Annotated[float | None, typer.Option(help="Protect this share of each FFN (by --metric).")] = None,
    pad_to_widest: Annotated[bool, typer.Option("--pad-to-widest", help="Save unequal widths zero-padded.")] = False,
    evaluate: Annotated[bool, typer.Option(help="Measure perplexity before and after on held-out text.")] = True,
    text: opt.Text = "sotu",
    split: opt.Split = None,
    num_samples: opt.Samples = 64,
    max_length: opt.Length = 512,
    batch_size: opt.Batch = 4,
    seed: opt.Seed = 42,
    param: opt.Params = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.Remote = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Prune and save: score -> plan -> slice -> OUT, a checkpoint that plain transformers loads."""
    if (sparsity is None) == (plan is None):
        raise UsageError("give either --sparsity (make a plan) or --plan FILE (apply one).")
    refuse_existing(out, overwrite)
    if evaluate and held_out_split(text) is None:
        raise UsageError(
            f"{text} has no known held-out split to measure on. Pass --no-evaluate, and use `ffnscope eval` with "
            "another text."
        )
    reporter = Reporter()
    given = read_plan(plan) if plan else None
    budget = Budget(sparsity or 0.0, multiple_of)
    params = opt.metric_params(param, [metric])
    loaded = opt.open_model(reporter, model, device, dtype, trust_remote_code)
    choice = opt.TextChoice(text, split, num_samples, max_length, batch_size, seed)
    if given is None:
        if scores:
            found = _read_scores(scores, metric, loaded)
        else:
            found = _score_all(loaded, find_sites(loaded.model), params, choice, reporter)[metric]
        core = None if core_fraction is None else top_core(found, core_fraction)
        given = build_plan(found, budget, allocator, protected=core)
    if evaluate:
        _before_and_after(loaded, given, replace(choice, split=None), reporter)
    before = sum(p.numel() for p in loaded.model.parameters())
    prune_(loaded.model, given, pad_to_widest=pad_to_widest)
    after = sum(p.numel() for p in loaded.model.parameters())
    save_model(loaded.model, loaded.tokenizer, out, plan=given, overwrite=overwrite)
    reporter.say(f"{before:,} -> {after:,} parameters ({1 - after / before:.1%} fewer), saved in {out}")


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
    per_batch = batch_size * max_length * (1 + len(plans))
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


def _score_all(
    loaded: LoadedModel,
    sites: list[FFNSite],
    params: Mapping[str, Mapping[str, Any]],
    choice: opt.TextChoice,
    reporter: Reporter,
    folder: Path | None = None,
) -> dict[str, Scores]:
    """Calibrate once for all metrics and score; with a folder, also write scores and statistics."""
    windows = choice.calibration(loaded)
    part = folder / "statistics.part.safetensors" if folder else None
    options = PassOptions(batch_size=choice.batch_size, checkpoint=part)
    with reporter.task("calibrate", "tokens") as update:
        stats = calibrate(loaded.model, windows, list(params), sites=sites, options=options, on_batch=update)
    facts = {"model": weights_hash(loaded.model), "calibration": describe_windows(windows)}
    found = {m: score(loaded.model, stats, m, facts=facts, **p) for m, p in params.items()}
    if folder:
        write_stats(folder / "statistics.safetensors", stats.values(), facts)
        write_scores(folder / "scores.safetensors", found.values(), facts)
    return found


def _read_scores(path: Path, metric: str, loaded: LoadedModel) -> Scores:
    found, facts = read_scores(path)
    if metric not in found:
        raise UsageError(f"{path} holds scores of {', '.join(found)}; {metric!r} is not among them.")
    if facts.get("model") != weights_hash(loaded.model):
        raise UsageError(f"{path} was made from other weights than {loaded.source.model_id}; score this model.")
    return found[metric]


def _before_and_after(loaded: LoadedModel, plan: PruningPlan, choice: opt.TextChoice, reporter: Reporter) -> None:
    windows = choice.held_out(loaded)
    with reporter.task(f"evaluate on {windows.source.split(':')[0]}", "batches") as update:
        rows = compare_plans(loaded.model, {"pruned": plan}, windows, batch_size=choice.batch_size, on_batch=update)
    print_results(rows, OUT)
