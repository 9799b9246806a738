"""Options of the command prune: what to remove, by which method, and the form of the result."""

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
from ffnscope.apply.record import PruningRecord
from ffnscope.cli import options as opt
from ffnscope.cli.prune_job import PruneJob
from ffnscope.errors import UsageError
from ffnscope.plan.build import build_plan, top_core
from ffnscope.plan.curves import Curves
from ffnscope.run.saving import Saving
from ffnscope.types import Budget, FFNSite, PruningPlan, Scores


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
        str, typer.Option(help="scores (ranking alone), or best: scar_loss_proxy, halfway, sequential reconstruction.")
    ] = "scores"
    metric: Annotated[
        str | None, typer.Option("--metric", "-m", help="Metric that ranks the channels; default: that of --method.")
    ] = None
    allocator: Annotated[
        str | None,
        typer.Option(
            help="local (same sparsity everywhere; a checkpoint that plain transformers loads), or with different "
            "widths global, halfway, standardised, outliers, measured (by loss curves); default: that of --method."
        ),
    ] = None
    reconstruct: Annotated[
        str | None,
        typer.Option(
            help="What makes up for the rest: none, one-shot or sequential (least squares, block by block), or bias "
            "(means of removed channels); default: as --method."
        ),
    ] = None
    sequential: Annotated[bool, typer.Option("--sequential", help="The same as --reconstruct sequential.")] = False
    target: Annotated[
        float | None, typer.Option(help="Of --reconstruct sequential: 0 = the FFN's own output, 1 = the dense model's.")
    ] = None
    damping: Annotated[
        float | None,
        typer.Option(help="Pull of the refit towards the old weights; default: chosen on held-out windows."),
    ] = None
    distill: Annotated[
        int | None,
        typer.Option(
            metavar="EPOCHS", help="Of --reconstruct sequential: also train what stays of each FFN, no labels."
        ),
    ] = None
    rounds: Annotated[
        int | None,
        typer.Option(help="Remove in this many steps; each ranks what is left, reconstructed. Default: 1."),
    ] = None

    def __post_init__(self) -> None:
        if self.sequential and self.reconstruct not in (None, "sequential"):
            raise UsageError(
                f"--sequential is the same as --reconstruct sequential; --reconstruct {self.reconstruct} is another "
                "reconstruction. Give one of them."
            )

    @property
    def _refit(self) -> str | None:
        """The reconstruction that is asked for, as the library names it."""
        if self.sequential:
            return "sequential"
        return None if self.reconstruct is None else self.reconstruct.replace("-", "_")

    def chosen(self, context: typer.Context, earlier: Method | None = None) -> Method:
        """Check these options and join them; raises UsageError for what is unknown or would do nothing.

        ``earlier`` is the method of the result that is cut again, which fills in what is not given.
        """
        changes: dict[str, Any] = {"metric": self.metric, "allocator": self.allocator, "rounds": self.rounds}
        changes["reconstruct"] = self._refit
        found = named_method(self.method, **changes) if earlier is None else changed_method(earlier, **changes)
        refit = found.reconstruct.replace("_", "-")
        if found.reconstruct != "sequential":
            opt.refuse_useless(context, f"--reconstruct {refit}", ("target", "distill"))
        if not found.refits:
            opt.refuse_useless(context, f"--reconstruct {refit}", ("damping",))
        given = {"target": self.target, "damping": self.damping, "distill": self.distill}
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
    min_keep: Annotated[
        float, typer.Option(help="Every FFN keeps at least this share of its channels (above 1: this many).")
    ] = 0.0
    protect_fraction: Annotated[
        float | None, typer.Option(help="Keep this share of each FFN, its best by --metric, whatever the allocator.")
    ] = None

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.plan is None):
            raise UsageError("give either --sparsity (make a plan) or --plan FILE (apply one).")
        if self.run is not None and (self.plan or self.scores):
            other = "--plan" if self.plan else "--scores"
            raise UsageError(f"--from {self.run} and {other} both say which channels go. Give one of them.")

    def budget(self, context: typer.Context, record: PruningRecord | None) -> Budget:
        """How much to remove; steps of the widths and floors of an earlier result where none are given."""
        asked = Budget(self.sparsity or 0.0, self.multiple_of, min_keep=self.min_keep)
        if record is None:
            return asked
        kept = {n: getattr(record.budget, n) for n in ("multiple_of", "min_keep") if not opt.given(context, n)}
        return replace(asked, min_width=record.budget.min_width, **kept)

    def check(self, method: Method, budget: Budget, saving: Saving) -> None:
        """Raise for what cannot be planned, or not be saved."""
        if self.plan is None:
            _check_protection(self.protect_fraction, budget.sparsity)
            saving.check_allocator(method.allocator)
            method.check_budget(budget)

    def protected(self, one: Scores, record: PruningRecord | None) -> Mapping[FFNSite, Tensor]:
        """Channels that stay whatever the allocator says; those of an earlier result, unless a share is given."""
        if self.protect_fraction is not None:
            return top_core(one, self.protect_fraction)
        return {} if record is None else record.protected

    def make(self, one: Scores, budget: Budget, job: PruneJob, part: Path, curves: Curves | None = None) -> PruningPlan:
        """Build the plan; say so when the protection changes nothing."""
        made = job.plan(one, budget, self.protected(one, job.record), part, curves)
        if self.protect_fraction is None or job.method.rounds > 1:
            return made
        bare = build_plan(one, budget, job.method.allocator, curves=curves)
        if all(torch.equal(kept, bare.kept[site]) for site, kept in made.kept.items()):
            job.reporter.say(
                f"note: --protect-fraction {self.protect_fraction:g} changes nothing here; the plan keeps these "
                "channels anyway."
            )
        return made


def _check_protection(fraction: float | None, sparsity: float) -> None:
    if fraction is None:
        return
    if not 0 < fraction <= 1:
        raise UsageError(f"--protect-fraction must be in (0, 1], the share of each FFN that stays; got {fraction:g}.")
    if fraction + sparsity > 1:
        raise UsageError(
            f"cannot remove {sparsity:g} of the channels while --protect-fraction keeps {fraction:g}. Lower one."
        )
