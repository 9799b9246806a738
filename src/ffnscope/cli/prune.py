"""The command prune: score -> plan -> reconstruct -> slice -> save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ffnscope.apply.export import SHARD
from ffnscope.apply.method import Method, changed_method, named_method
from ffnscope.apply.reconstruction import Reconstruction
from ffnscope.apply.record import PruningRecord, write_record
from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT
from ffnscope.cli.files import Out, Overwrite, check_output, read_metric, working_folder
from ffnscope.cli.groups import grouped, option_names
from ffnscope.cli.prune_estimate import print_prune_estimate
from ffnscope.cli.prune_from import loading_of, model_of, open_record, text_of
from ffnscope.cli.prune_job import PruneJob
from ffnscope.errors import UsageError
from ffnscope.io import read_plan
from ffnscope.plan.build import build_plan, check_allocator_name, top_core
from ffnscope.report.error_table import print_profile
from ffnscope.run.progress import Reporter
from ffnscope.run.saving import Saving
from ffnscope.run.texts import held_out_split
from ffnscope.types import Budget, FFNSite, PruningPlan, Scores

WINDOWS, LENGTH = 128, 256
"""Of the calibration of a reconstruction: as many tokens as without, in more places of the text."""
OptionalModel = Annotated[
    str | None, typer.Argument(help="Hub id, directory, .gguf file, or package:DIST; with --from that of RUN.")
]
_TEXT = option_names(opt.TextChoice)
_OF_SCORES = (*(name for name in option_names(opt.MetricOptions) if name != "module"), "split", "rounds")
_OF_PLAN = (
    *("method", "metric", "module", "scores", "allocator", "multiple_of", "protect_fraction", "keep_statistics"),
    *_OF_SCORES,
)


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """The form of the checkpoint."""

    form: Annotated[str, typer.Option("--format", help="transformers, decilm (for vLLM) or gguf (one file).")] = (
        "transformers"
    )
    pad_to_widest: Annotated[bool, typer.Option("--pad-to-widest", help="Zero-pad all FFNs to the widest.")] = False
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file, such as 500MB.")] = SHARD
    keep_statistics: Annotated[
        bool,
        typer.Option("--keep-statistics", help="Keep statistics in OUT/ffnscope, for --from with one-shot refits."),
    ] = False

    def saving(self, context: typer.Context, out: Path, overwrite: bool) -> Saving:
        """Check these options, and join them with the output."""
        saving = Saving(out, self.form, self.pad_to_widest, self.max_shard_size, overwrite)
        if self.form == "gguf":
            opt.refuse_useless(context, "--format gguf, which writes one file", ("max_shard_size", "keep_statistics"))
        return saving


@dataclass(frozen=True, slots=True)
class MethodChoice:
    """Which parts prune: those of a named method, or others in their place."""

    method: Annotated[
        str, typer.Option(help="scores (ranking alone), or best: obs_loss, halfway, sequential reconstruction.")
    ] = "scores"
    metric: Annotated[
        str | None, typer.Option("--metric", "-m", help="Metric that ranks the channels; default: that of --method.")
    ] = None
    allocator: Annotated[
        str | None,
        typer.Option(
            help="local (same sparsity everywhere; a checkpoint that plain transformers loads), or with different "
            "widths global, halfway, standardised, outliers; default: that of --method."
        ),
    ] = None
    reconstruct: Annotated[
        str | None,
        typer.Option(help="Refit what stays: none, one-shot or sequential (block by block); default: as --method."),
    ] = None
    target: Annotated[
        float | None, typer.Option(help="Of --reconstruct sequential: 0 = the FFN's own output, 1 = the dense model's.")
    ] = None
    damping: Annotated[
        float | None,
        typer.Option(help="Pull of the refit towards the old weights; default: chosen on held-out windows."),
    ] = None

    rounds: Annotated[
        int | None,
        typer.Option(help="Remove in this many steps; each ranks what is left, reconstructed. Default: 1."),
    ] = None

    def chosen(self, context: typer.Context, earlier: Method | None = None) -> Method:
        """Check these options and join them; raises UsageError for what is unknown or would do nothing.

        ``earlier`` is the method of the result that is cut again, which fills in what is not given.
        """
        changes: dict[str, Any] = {"metric": self.metric, "allocator": self.allocator, "rounds": self.rounds}
        changes["reconstruct"] = None if self.reconstruct is None else self.reconstruct.replace("-", "_")
        found = named_method(self.method, **changes) if earlier is None else changed_method(earlier, **changes)
        refit = found.reconstruct.replace("_", "-")
        if found.reconstruct != "sequential":
            opt.refuse_useless(context, f"--reconstruct {refit}", ("target",))
        if found.reconstruct == "none":
            opt.refuse_useless(context, f"--reconstruct {refit}", ("damping",))
        given = {"target": self.target, "damping": self.damping}
        return changed_method(found, **given)


@dataclass(frozen=True, slots=True)
class PlanChoice:
    """What to remove: a plan, or how much by which scores.

    Raises:
        UsageError: not one of the two, or an impossible budget or protection.
    """

    sparsity: Annotated[float | None, typer.Option(help="Fraction of channels to remove, in [0, 1).")] = None
    plan: Annotated[Path | None, typer.Option(help="Apply this plan instead of making one.")] = None
    scores: Annotated[Path | None, typer.Option(help="Use these scores instead of calibrating.")] = None
    run: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Cut again what an earlier prune or run has scored; it fills in what is not given."
        ),
    ] = None
    multiple_of: Annotated[int, typer.Option(help="Kept widths are multiples of this.")] = 1
    protect_fraction: Annotated[
        float | None, typer.Option(help="Keep this share of each FFN, its best by --metric, whatever the allocator.")
    ] = None

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.plan is None):
            raise UsageError("give either --sparsity (make a plan) or --plan FILE (apply one).")
        if self.run is not None and (self.plan or self.scores):
            other = "--plan" if self.plan else "--scores"
            raise UsageError(f"--from {self.run} and {other} both say which channels go. Give one of them.")

    @property
    def budget(self) -> Budget:
        """How much to remove."""
        return Budget(self.sparsity or 0.0, self.multiple_of)

    def check(self, method: Method, saving: Saving) -> None:
        """Raise for what cannot be planned, or not be saved."""
        if self.plan is None:
            _check_protection(self.protect_fraction, self.sparsity or 0.0)
            check_allocator_name(method.allocator)
            saving.check_allocator(method.allocator)
            method.check_budget(self.budget)

    def recorded(self, context: typer.Context, record: PruningRecord) -> PlanChoice:
        """The same, with the step of the widths of an earlier result, unless another is given."""
        given = opt.given(context, "multiple_of")
        return self if given else replace(self, multiple_of=record.budget.multiple_of)

    def protected(self, one: Scores, record: PruningRecord | None) -> Mapping[FFNSite, Tensor]:
        """Channels that stay whatever the allocator says; those of an earlier result, unless a share is given."""
        if self.protect_fraction is not None:
            return top_core(one, self.protect_fraction)
        return {} if record is None else record.protected

    def make(self, scores: Scores, job: PruneJob, part: Path) -> PruningPlan:
        """Build the plan; say so when the protection changes nothing."""
        one = replace(scores, facts={**scores.facts, "model_id": job.loaded.source.model_id})
        budget = replace(self.budget, min_width=1 if job.record is None else job.record.budget.min_width)
        made = job.plan(one, budget, self.protected(one, job.record), part)
        if self.protect_fraction is None or job.method.rounds > 1:
            return made
        bare = build_plan(one, budget, job.method.allocator)
        if all(torch.equal(kept, bare.kept[site]) for site, kept in made.kept.items()):
            job.reporter.say(
                f"note: --protect-fraction {self.protect_fraction:g} changes nothing here; the plan keeps these "
                "channels anyway."
            )
        return made


@dataclass(frozen=True, slots=True)
class Known:
    """What files of earlier commands decide already: a plan, or scores with the hash of their weights; or nothing."""

    plan: PruningPlan | None = None
    scores: tuple[Scores, str] | None = None

    def of_this_model(self, path: Path | None, job: PruneJob) -> Scores | None:
        """The scores, if any; raises UsageError when they are of other weights."""
        if job.record is not None:
            job.record.check_model(job.model_hash)
            return job.record.scores
        if self.scores is None:
            return None
        found, model_hash = self.scores
        if model_hash != job.model_hash:
            raise UsageError(
                f"{path} was made from other weights than those of {job.loaded.source.model_id} (or in another dtype). "
                "Score this model, or give the same --dtype."
            )
        return found


@grouped
def prune_command(
    *,
    context: typer.Context,
    model: OptionalModel = None,
    out: Out,
    wanted: PlanChoice,
    choice: MethodChoice,
    form: SaveOptions,
    evaluate: Annotated[bool, typer.Option(help="Measure perplexity before and after on held-out text.")] = True,
    text: opt.TextChoice,
    needs: opt.MetricOptions,
    loading: opt.Loading,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and how long it would take.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Prune and save: score -> plan -> reconstruct -> slice -> OUT, a checkpoint, or a DeciLM or GGUF export.

    With a reconstruction the calibration has 128 windows of 256 tokens unless --num-samples and --max-length say
    otherwise, and 32 of them run backward where the metric needs it. An interrupted call goes on where it stopped.

    With --from, nothing is calibrated: the scores, the text and, where not given, the other parts are those of an
    earlier prune or run, and MODEL may be left out.
    """
    record = open_record(context, wanted.run, choice.metric, text, form.keep_statistics) if wanted.run else None
    method = choice.chosen(context, record and record.method)
    if record is not None:
        record.check_method(method)
        text, loading = text_of(context, text, record), loading_of(context, loading, record)
        wanted = wanted.recorded(context, record)
    refits = method.reconstruct != "none"
    _refuse_useless(context, wanted, not evaluate and not refits, refits)
    check_output(out, overwrite)
    saving = form.saving(context, out, overwrite)
    wanted.check(method, saving)
    held_out = _held_out(text) if evaluate else None
    decided = wanted.plan or wanted.scores or wanted.run
    inputs = None if decided else needs.inputs(context, [method.metric], text.seed)
    if record is None and (inputs or refits):
        text.check_calibration()
    plan = read_plan(wanted.plan) if wanted.plan else None
    known = Known(plan, read_metric(wanted.scores, method.metric) if wanted.scores else None)
    reporter = Reporter()
    loaded = loading.open(reporter, model_of(model, record))
    saving.check_model(loaded)
    job = PruneJob(loaded, method, _calibration(context, text, method), inputs, reporter, record, form.keep_statistics)
    scores = known.of_this_model(wanted.scores, job)
    job.check_sites(plan, scores)
    if dry_run:
        print_prune_estimate(job, wanted.budget, held_out.held_out(loaded) if held_out else None, OUT)
        return
    with working_folder(out.with_name(f".{out.name}.prune.part")) as part:
        if plan is None:
            scores = job.score(part) if scores is None else scores
            plan = wanted.make(scores, job, part)
        kept = None
        if scores is not None and form.form != "gguf":
            kept = job.keep(scores, plan.budget, wanted.protected(scores, record), held_out or text, part)
        _finish(job, plan, saving, held_out, part)
        if kept is not None:
            write_record(out, kept)


def _finish(job: PruneJob, plan: PruningPlan, saving: Saving, held_out: opt.TextChoice | None, part: Path) -> None:
    """Reconstruct, measure and save."""
    saving.check_plan(job.loaded, plan, job.reporter)
    pruned = job.reconstruct(plan, part)
    rows = job.compare(pruned, held_out, part) if held_out else []
    if isinstance(pruned, Reconstruction):
        print_profile(pruned, OUT)
    saving.prune_and_save(job.loaded, pruned, {row.label: row.results for row in rows}, job.reporter)


def _calibration(context: typer.Context, text: opt.TextChoice, method: Method) -> opt.TextChoice:
    """The text to calibrate on: more and shorter windows for a reconstruction, unless the user gave other numbers."""
    if method.reconstruct == "none":
        return text
    wanted = {"num_samples": WINDOWS, "max_length": LENGTH}
    return replace(text, **{name: n for name, n in wanted.items() if not opt.given(context, name)})


def _refuse_useless(context: typer.Context, wanted: PlanChoice, reads_no_text: bool, refits: bool) -> None:
    """Refuse options that would silently do nothing."""
    for option, value, useless in (
        ("plan", wanted.plan, _OF_PLAN),
        ("scores", wanted.scores, _OF_SCORES),
        ("from", wanted.run, ()),
    ):
        if value is None:
            continue
        if reads_no_text:
            opt.refuse_useless(context, f"--{option} {value} and --no-evaluate, which read no text", _TEXT)
        unused = [name for name in useless if name != "split" or not refits]
        opt.refuse_useless(context, f"--{option} {value}, which already decides that", unused)


def _check_protection(fraction: float | None, sparsity: float) -> None:
    if fraction is None:
        return
    if not 0 < fraction <= 1:
        raise UsageError(f"--protect-fraction must be in (0, 1], the share of each FFN that stays; got {fraction:g}.")
    if fraction + sparsity > 1:
        raise UsageError(
            f"cannot remove {sparsity:g} of the channels while --protect-fraction keeps {fraction:g}. Lower one."
        )


def _held_out(text: opt.TextChoice) -> opt.TextChoice:
    """The text to measure on; raises UsageError where it is not known which part is held out."""
    held_out = held_out_split(text.text)
    if held_out is None:
        raise UsageError(
            f"{text.text} has no known held-out split to measure on. Pass --no-evaluate, and use `ffnscope eval` with "
            "another text."
        )
    if text.split == held_out:
        raise UsageError(
            f"--split {text.split} is the held-out split of {text.text}, on which the result is measured. Calibrate on "
            "another, or pass --no-evaluate."
        )
    found = replace(text, split=None)
    found.check_held_out()
    return found
