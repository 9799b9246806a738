"""The command prune: score -> plan -> slice -> save."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from ffnscope.apply.export import SHARD
from ffnscope.calibrate.collect import weights_hash
from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT, score_all
from ffnscope.cli.files import Out, Overwrite, check_output, read_metric
from ffnscope.cli.groups import grouped, option_names
from ffnscope.errors import UsageError
from ffnscope.evaluate.compare import EvalRow
from ffnscope.ffn.load import LoadedModel
from ffnscope.io import read_plan
from ffnscope.plan.build import build_plan, check_allocator_name, top_core
from ffnscope.report.tables import print_results
from ffnscope.run.progress import Reporter
from ffnscope.run.saving import Saving
from ffnscope.run.steps import compare_with_dense
from ffnscope.run.texts import held_out_split
from ffnscope.types import Budget, PruningPlan, Scores

_TEXT = option_names(opt.TextChoice)
_OF_SCORES = (*(name for name in option_names(opt.MetricOptions) if name != "module"), "split")
_OF_PLAN = ("metric", "module", "scores", "allocator", "multiple_of", "protect_fraction", *_OF_SCORES)


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """The form of the checkpoint."""

    form: Annotated[str, typer.Option("--format", help="transformers, decilm (for vLLM) or gguf (one file).")] = (
        "transformers"
    )
    pad_to_widest: Annotated[bool, typer.Option("--pad-to-widest", help="Zero-pad all FFNs to the widest.")] = False
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file, such as 500MB.")] = SHARD

    def saving(self, context: typer.Context, out: Path, overwrite: bool) -> Saving:
        """Check these options, and join them with the output."""
        saving = Saving(out, self.form, self.pad_to_widest, self.max_shard_size, overwrite)
        if self.form == "gguf":
            opt.refuse_useless(context, "--format gguf, which writes one file", ("max_shard_size",))
        return saving


@grouped
def prune_command(
    *,
    context: typer.Context,
    model: opt.Model,
    out: Out,
    metric: Annotated[str, typer.Option("--metric", "-m", help="Metric that ranks the channels.")] = "scar_loss_proxy",
    sparsity: Annotated[float | None, typer.Option(help="Fraction of channels to remove, in [0, 1).")] = None,
    plan: Annotated[Path | None, typer.Option(help="Apply this plan instead of making one.")] = None,
    scores: Annotated[Path | None, typer.Option(help="Use these scores instead of calibrating.")] = None,
    allocator: Annotated[
        str, typer.Option(help="local (same sparsity everywhere), global, halfway, standardised or outliers.")
    ] = "local",
    multiple_of: Annotated[int, typer.Option(help="Kept widths are multiples of this.")] = 1,
    protect_fraction: Annotated[
        float | None, typer.Option(help="Keep this share of each FFN, its best by --metric, whatever the allocator.")
    ] = None,
    form: SaveOptions,
    evaluate: Annotated[bool, typer.Option(help="Measure perplexity before and after on held-out text.")] = True,
    text: opt.TextChoice,
    needs: opt.MetricOptions,
    loading: opt.Loading,
    overwrite: Overwrite = False,
) -> None:
    """Prune and save: score -> plan -> slice -> OUT, a checkpoint for transformers, or a DeciLM or GGUF export."""
    if (sparsity is None) == (plan is None):
        raise UsageError("give either --sparsity (make a plan) or --plan FILE (apply one).")
    _refuse_useless(context, plan, scores, evaluate)
    _check_protection(protect_fraction, sparsity or 0.0)
    check_output(out, overwrite)
    saving = form.saving(context, out, overwrite)
    held_out = replace(text, split=None)
    if evaluate:
        _check_held_out(text.text, text.split)
        held_out.check_held_out()
    inputs = None if plan or scores else needs.inputs(context, [metric], text.seed)
    if inputs:
        text.check_calibration()
    budget = Budget(sparsity or 0.0, multiple_of)
    check_allocator_name(allocator)
    given = read_plan(plan) if plan else None
    found = read_metric(scores, metric) if scores else None
    reporter = Reporter()
    loaded = loading.open(reporter, model)
    saving.check_model(loaded)
    if given is None:
        one = _of_this_model(*found, scores, loaded) if found else _score(loaded, inputs, text, reporter)
        one = replace(one, facts={**one.facts, "model_id": model})
        given = _plan(one, budget, allocator, protect_fraction, reporter)
    saving.check_plan(loaded, given, reporter)
    rows: list[EvalRow] = []
    if evaluate:
        windows = held_out.held_out(loaded)
        rows = compare_with_dense(reporter, loaded.model, {"pruned": given}, windows, text.batch_size)
        print_results(rows, OUT)
    saving.prune_and_save(loaded, given, {row.label: row.results for row in rows}, reporter)


def _refuse_useless(context: typer.Context, plan: Path | None, scores: Path | None, evaluate: bool) -> None:
    """Refuse options that would silently do nothing."""
    for option, value, useless in (("plan", plan, _OF_PLAN), ("scores", scores, _OF_SCORES)):
        if value is None:
            continue
        if not evaluate:
            opt.refuse_useless(context, f"--{option} {value} and --no-evaluate, which read no text", _TEXT)
        opt.refuse_useless(context, f"--{option} {value}, which already decides that", useless)


def _check_protection(fraction: float | None, sparsity: float) -> None:
    if fraction is None:
        return
    if not 0 < fraction <= 1:
        raise UsageError(f"--protect-fraction must be in (0, 1], the share of each FFN that stays; got {fraction:g}.")
    if fraction + sparsity > 1:
        raise UsageError(
            f"cannot remove {sparsity:g} of the channels while --protect-fraction keeps {fraction:g}. Lower one."
        )


def _plan(one: Scores, budget: Budget, allocator: str, protect: float | None, reporter: Reporter) -> PruningPlan:
    """Build the plan; say so when the protection changes nothing."""
    bare = build_plan(one, budget, allocator)
    if protect is None:
        return bare
    made = build_plan(one, budget, allocator, protected=top_core(one, protect))
    if all(torch.equal(kept, bare.kept[site]) for site, kept in made.kept.items()):
        reporter.say(
            f"note: --protect-fraction {protect:g} changes nothing here; the plan keeps these channels anyway."
        )
    return made


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


def _of_this_model(scores: Scores, model_hash: str, path: Path | None, loaded: LoadedModel) -> Scores:
    if model_hash != weights_hash(loaded.model):
        raise UsageError(
            f"{path} was made from other weights than those of {loaded.source.model_id} (or in another dtype). Score "
            "this model, or give the same --dtype."
        )
    return scores
