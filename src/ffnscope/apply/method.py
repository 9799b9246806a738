"""Named ways to prune: a metric, an allocator, and how what stays is reconstructed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import nn

from ffnscope.apply.block_distill import check_distillable
from ffnscope.apply.distill import Distillation
from ffnscope.apply.held_out import FitStatistics, Statistics
from ffnscope.apply.one_shot import compensate_bias, reconstruct
from ffnscope.apply.pruned import Pruned
from ffnscope.apply.reconstruction import check_linear
from ffnscope.apply.sequential import HELD_OUT_EVERY, TARGET, SequentialOptions, reconstruct_sequential
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError, unknown_name
from ffnscope.registry import ALLOCATORS
from ffnscope.types import Budget, FFNSite, PruningPlan

Refit = Literal["none", "one_shot", "sequential", "bias"]
REFITS: tuple[Refit, ...] = get_args(Refit)
GRADIENT_WINDOWS = 128
"""Windows that also run backward beside a reconstruction; where wide FFNs need more windows, these are enough."""


@dataclass(frozen=True, slots=True)
class Method:
    """Which parts prune.

    Attributes:
        metric: ranks the channels.
        allocator: chooses the widths.
        reconstruct: "none"; "one_shot" (`reconstruct`: least squares on the dense model's activations); "sequential"
            (`reconstruct_sequential`: block by block on those of the pruned model); "bias" (`compensate_bias`: the
            means of removed channels as a bias, columns as they are).
        target: of the sequential one, see `SequentialOptions`; None for 0.35.
        damping: see `refit_down`; None for the choice of every 8th window, or 0.01 where there are fewer.
        distill: epochs of a distillation within the sequential one, which trains weights (see `Distillation`, of which
            the rest are the defaults); None trains nothing.
        rounds: in how many steps channels are removed; from the second on, those of the model that is pruned and
            reconstructed so far are ranked (see `plan_in_rounds`).

    Raises:
        UsageError: an unknown reconstruction, or a value that is impossible or would do nothing.
    """

    metric: str = "scar_loss_proxy"
    allocator: str = "halfway"
    reconstruct: Refit = "sequential"
    target: float | None = None
    damping: float | None = None
    distill: int | None = None
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.reconstruct not in REFITS:
            raise unknown_name("reconstruction", self.reconstruct, REFITS)
        if self.target is not None and self.reconstruct != "sequential":
            raise UsageError(
                f"target would do nothing with reconstruct {self.reconstruct!r}; only 'sequential' has one."
            )
        if self.distill is not None and self.reconstruct != "sequential":
            raise UsageError(
                f"distill would do nothing with reconstruct {self.reconstruct!r}; only 'sequential' trains FFN by FFN."
            )
        if self.damping is not None and not self.refits:
            raise UsageError(
                f"damping would do nothing with reconstruct {self.reconstruct!r}. Leave it out, or refit the columns."
            )
        _ = self.sequential(SequentialOptions())  # refuses impossible values
        if self.rounds < 1:
            raise UsageError(
                f"rounds must be at least 1, the number of times that channels are ranked; got {self.rounds}."
            )
        if self.rounds > 1 and self.measures:
            raise UsageError(
                f"{self.rounds} rounds do not go with allocator {self.allocator!r}, which plans by curves of the dense "
                "model. Choose one of them."
            )

    @property
    def refits(self) -> bool:
        """Whether columns that stay are fitted anew, by least squares."""
        return self.reconstruct in ("one_shot", "sequential")

    @property
    def untrained(self) -> Method:
        """The same without a distillation: what reconstructs between rounds."""
        return replace(self, distill=None)

    @property
    def measures(self) -> bool:
        """Whether the allocator reads measured loss curves."""
        return ALLOCATORS.get(self.allocator).needs_curves

    @property
    def statistics(self) -> tuple[str, ...]:
        """Statistics that the reconstruction reads, beside those of the metric."""
        return {"one_shot": ("h_outer",), "bias": ("act_sum",)}.get(self.reconstruct, ())

    @property
    def holds_out(self) -> bool:
        """Whether the reconstruction reads statistics of held-out windows, that choose the damping, where there are."""
        return self.reconstruct == "one_shot" and self.damping is None

    @property
    def curve_statistics(self) -> tuple[str, ...]:
        """Statistics that measured curves read: where columns are refitted in the end, they are in the curves too."""
        return ("h_outer",) if self.measures and self.refits else ()

    @property
    def steps(self) -> str:
        """What the progress of the reconstruction counts."""
        return "blocks" if self.distill is None else "blocks and epochs"

    def sequential(self, options: SequentialOptions) -> SequentialOptions:
        """Options with the target, the damping and the distillation of this method."""
        target = TARGET if self.target is None else self.target
        distillation = None if self.distill is None else Distillation(self.distill)
        return replace(options, target=target, damping=self.damping, distillation=distillation)

    def check_sites(self, sites: Sequence[FFNSite]) -> None:
        """Raise NotAvailableError when one of these FFNs cannot be reconstructed in this way, before any work."""
        if self.reconstruct != "none":
            check_linear(sites)
        if self.distill is not None:
            check_distillable(sites)

    def check_windows(self, count: int) -> None:
        """Raise UsageError when a calibration text has too few windows, before any work."""
        if self.distill is not None and count < HELD_OUT_EVERY:
            raise UsageError(
                f"a distillation holds out every {HELD_OUT_EVERY}th window to choose the epoch; got {count} windows. "
                f"Give at least {HELD_OUT_EVERY}."
            )

    def check_budget(self, budget: Budget) -> None:
        """Raise UsageError when nothing is removed that could be made up for."""
        if self.reconstruct != "none" and budget.sparsity == 0:
            raise UsageError(f"sparsity 0 leaves nothing for reconstruct {self.reconstruct!r} to make up for.")
        if self.rounds > 1 and budget.sparsity == 0:
            raise UsageError(f"sparsity 0 leaves nothing for {self.rounds} rounds to remove.")


METHODS: dict[str, Method] = {"scores": Method("scar_loss_proxy", "local", "none"), "best": Method()}
"""scores: ranking alone; best: the parts that did best in docs/log.md and benchmarks/structured.py."""


def named_method(name: str, **changes: Any) -> Method:
    """The method of a name with some parts changed; a change of None keeps the part.

    Raises:
        UsageError: no such name; or see `Method`.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return changed_method(METHODS[name], **changes)


def changed_method(method: Method, **changes: Any) -> Method:
    """A method with some parts changed; a change of None keeps the part.

    Another reconstruction has the default target and damping and trains nothing, unless these are given too.

    Raises:
        UsageError: see `Method`.
    """
    given: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    if given.get("reconstruct", method.reconstruct) != method.reconstruct:
        given = {"target": None, "damping": None, "distill": None, **given}
    return replace(method, **given)


def reconstruct_plan(
    model: nn.Module,
    plan: PruningPlan,
    method: Method,
    *,
    windows: Windows | None = None,
    stats: Statistics | FitStatistics | None = None,
    options: SequentialOptions | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> Pruned:
    """Reconstruct a plan as a method says; with "none", return the plan.

    Args:
        model: the dense model; left as it was.
        plan: what stays.
        method: its metric and allocator are not read.
        windows: text of a sequential reconstruction.
        stats: with ``h_outer`` for one shot, ``act_sum`` for a bias. Only with those of held-out windows beside them a
            one-shot reconstruction chooses its damping.
        options: batches and checkpoint of a sequential one; target, damping and distillation are the method's.
        on_block: called with (blocks done, blocks in all) of a sequential one; see there for a distillation.

    Raises:
        UsageError: the windows or the statistics that it needs are not given.
        NotAvailableError, NonFiniteError, DeviceError, ArtifactError: see `reconstruct`, `reconstruct_sequential`.
    """
    if method.statistics:
        if stats is None:
            kind, needed = method.reconstruct.replace("_", "-"), method.statistics[0]
            raise UsageError(f"a {kind} reconstruction needs statistics with {needed}: pass stats=.")
        given = stats if isinstance(stats, FitStatistics) else FitStatistics(stats)
        if method.reconstruct == "bias":
            return compensate_bias(model, plan, given.whole)
        held_out = given.held_out if method.holds_out else None
        return reconstruct(model, plan, given.whole, damping=method.damping, held_out=held_out)
    if method.reconstruct == "sequential":
        if windows is None:
            raise UsageError("a sequential reconstruction needs the calibration text: pass windows=.")
        chosen = method.sequential(options or SequentialOptions())
        return reconstruct_sequential(model, windows, plan, options=chosen, on_block=on_block)
    return plan
