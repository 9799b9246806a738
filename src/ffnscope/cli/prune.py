"""The command prune: score -> plan -> slice -> save."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ffnscope.apply.export import prune_, save_model
from ffnscope.calibrate.collect import weights_hash
from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT, refuse_existing, score_all
from ffnscope.errors import UsageError
from ffnscope.evaluate.compare import compare_plans
from ffnscope.ffn.load import LoadedModel
from ffnscope.io import read_plan, read_scores
from ffnscope.plan.build import build_plan, top_core
from ffnscope.registry import ALLOCATORS
from ffnscope.report.tables import print_results
from ffnscope.run.progress import Reporter
from ffnscope.run.texts import held_out_split
from ffnscope.types import Budget, PruningPlan, Scores

_USELESS = {
    "plan": ("metric", "scores", "allocator", "multiple_of", "core_fraction", "param", "split", "reference"),
    "scores": ("param", "split", "reference"),
}
"""Option -> options that have no meaning beside it."""


def prune_command(
    context: typer.Context,
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
    reference: opt.Reference = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.Remote = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Prune and save: score -> plan -> slice -> OUT, a checkpoint that plain transformers loads."""
    _check_options(context, sparsity, plan, scores)
    refuse_existing(out, overwrite)
    if evaluate:
        _check_held_out(text, split)
    inputs = None if plan or scores else opt.Inputs(opt.metric_params(param, [metric]), core_fraction, reference)
    budget = Budget(sparsity or 0.0, multiple_of)
    ALLOCATORS.get(allocator)
    given = read_plan(plan) if plan else None
    found = _read_scores(scores, metric) if scores else None
    reporter = Reporter()
    loaded = opt.open_model(reporter, model, device, dtype, trust_remote_code)
    choice = opt.TextChoice(text, split, num_samples, max_length, batch_size, seed)
    if given is None:
        one = _of_this_model(*found, loaded) if found else _score(loaded, inputs, choice, reporter)
        core = None if core_fraction is None else top_core(one, core_fraction)
        given = build_plan(one, budget, allocator, protected=core)
    if len(set(given.widths.values())) > 1 and not pad_to_widest:
        prune_(loaded.model, given)  # raises, now and not after the evaluation
    if evaluate:
        _before_and_after(loaded, given, replace(choice, split=None), reporter)
    before = sum(p.numel() for p in loaded.model.parameters())
    prune_(loaded.model, given, pad_to_widest=pad_to_widest)
    after = sum(p.numel() for p in loaded.model.parameters())
    save_model(loaded.model, loaded.tokenizer, out, plan=given, overwrite=overwrite)
    reporter.say(f"{before:,} -> {after:,} parameters ({1 - after / before:.1%} fewer), saved in {out}")


def _check_options(context: typer.Context, sparsity: float | None, plan: Path | None, scores: Path | None) -> None:
    """Refuse options that contradict each other, or that would silently do nothing."""
    if (sparsity is None) == (plan is None):
        raise UsageError("give either --sparsity (make a plan) or --plan FILE (apply one).")
    for option, value in (("plan", plan), ("scores", scores)):
        if value is not None:
            opt.refuse_useless(context, option, value, _USELESS[option])


def _check_held_out(text: str, split: str | None) -> None:
    held_out = held_out_split(text)
    if held_out is None:
        raise UsageError(
            f"{text} has no known held-out split to measure on. Pass --no-evaluate, and use `ffnscope eval` with "
            "another text."
        )
    if split == held_out:
        raise UsageError(
            f"--split {split} is the held-out split of {text}, on which the result is measured. Calibrate on another, "
            "or pass --no-evaluate."
        )


def _score(loaded: LoadedModel, inputs: opt.Inputs | None, choice: opt.TextChoice, reporter: Reporter) -> Scores:
    assert inputs is not None, "made when neither a plan nor scores are given"
    (found,) = score_all(loaded, inputs.question(loaded), choice, reporter).values()
    return found


def _read_scores(path: Path, metric: str) -> tuple[Scores, str, Path]:
    """Scores of one metric, the hash of the weights that they were made from, and the file."""
    found, facts = read_scores(path)
    if metric not in found:
        raise UsageError(f"{path} holds scores of {', '.join(found)}; {metric!r} is not among them.")
    return found[metric], str(facts.get("model")), path


def _of_this_model(scores: Scores, model_hash: str, path: Path, loaded: LoadedModel) -> Scores:
    if model_hash != weights_hash(loaded.model):
        raise UsageError(
            f"{path} was made from other weights than those of {loaded.source.model_id} (or in another dtype). Score "
            "this model, or give the same --dtype."
        )
    return scores


def _before_and_after(loaded: LoadedModel, plan: PruningPlan, choice: opt.TextChoice, reporter: Reporter) -> None:
    windows = choice.held_out(loaded)
    with reporter.task(f"evaluate on {windows.source.split(':')[0]}", "batches") as update:
        rows = compare_plans(loaded.model, {"pruned": plan}, windows, batch_size=choice.batch_size, on_batch=update)
    print_results(rows, OUT)
