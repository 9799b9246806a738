"""The pruning block of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import Field, Strict, StrictBool, model_validator

from ffnscope.analyze.curves import CurveOptions
from ffnscope.analyze.measured import WINDOWS, CurveRounds
from ffnscope.apply.method import METHODS, Method, Refit
from ffnscope.registry import ALLOCATORS
from ffnscope.run.fields import (
    AllocatorName,
    Block,
    Count,
    Distinct,
    Fraction,
    MetricName,
    MinKeep,
    NotEmpty,
    Share,
    Sparsity,
)
from ffnscope.types import Budget

MethodName = Literal["scores", "best"]


class LossCurves(Block):
    """How the loss curves are measured that the allocator measured reads."""

    num_samples: Count = WINDOWS
    """Calibration windows to measure on, evenly spread over them."""
    shares: Annotated[tuple[Fraction, ...], NotEmpty, Distinct] = CurveOptions().shares
    """Kept shares of the channels of an FFN in the first round."""
    rounds: Count = 2
    """1, or more to measure again around each solution: at its widths, and 20 % of the channels above and below."""


class Pruning(Block):
    """Which metrics prune, and how much."""

    enabled: StrictBool = False
    """Prune and evaluate each algorithm at each sparsity."""
    ratios: Annotated[tuple[Sparsity, ...], NotEmpty, Distinct] = (0.1, 0.3, 0.5)
    """Sparsities: fractions of channels to remove, in [0, 1)."""
    method: MethodName = "scores"
    """Other defaults of what follows; best: halfway (widths differ, stock loaders need local), sequential.
    With a reconstruction the calibration text has other defaults too."""
    algorithms: Annotated[tuple[MetricName, ...], NotEmpty, Distinct] = ("scar_loss_proxy",)
    """Metrics that rank the channels; the lowest are removed."""
    structured: StrictBool = True
    """Remove whole channels (false: not available in this version)."""
    dependency_aware: StrictBool = True
    """Remove a channel from all coupled projections; nothing else is a channel."""
    allocator: AllocatorName = "local"
    """How the sparsity is spread over the FFNs: local (equal everywhere), global (one ranking), measured, ..."""
    curves: LossCurves = Field(default_factory=LossCurves)
    """Loss curves, for the allocator measured."""
    reconstruct: Refit = "none"
    """What makes up for the rest: none, one_shot or sequential (least squares on what stays), or bias (means)."""
    target: Share | None = None
    """Of the sequential one: 0 fits to the FFN's own output, 1 to the dense model's; null: 0.35."""
    damping: Annotated[float, Strict(), Field(gt=0)] | None = None
    """Pull of the refit towards the old weights; null: chosen on every 8th window (0.01 where there are fewer)."""
    distill: Count | None = None
    """Of the sequential one: epochs for which gate, up and down of each FFN are trained too; null: train nothing."""
    rounds: Count = 1
    """Remove in this many steps; from the second on, what the one before has left, reconstructed, is ranked."""
    multiple_of: Count = 1
    """Kept widths are multiples of this (kernels like 64 or 128)."""
    min_width: Count = 1
    """No FFN keeps fewer channels than this."""
    min_keep: MinKeep = 0.0
    """No FFN keeps less than this share of its channels (above 1: number); or by name, {model.layers.0.mlp: 0.8}."""

    @model_validator(mode="before")
    @classmethod
    def _of_method(cls, value: Any) -> Any:
        """Fill what is not given with the parts of a method other than the default."""
        if not isinstance(value, Mapping) or cast(Any, value).get("method") != "best":
            return cast(Any, value)
        best = METHODS["best"]
        parts = {"algorithms": [best.metric], "allocator": best.allocator, "reconstruct": best.reconstruct}
        return {**parts, **cast(Mapping[str, Any], value)}

    @property
    def reconstructs(self) -> bool:
        """Whether pruned models are reconstructed."""
        return self.enabled and self.reconstruct != "none"

    @property
    def refitted(self) -> bool:
        """Whether columns of pruned models are fitted anew, by least squares."""
        return self.enabled and self.reconstruct in ("one_shot", "sequential")

    def chosen(self, metric: str) -> Method:
        """The method with one of the metrics."""
        parts = (self.allocator, self.reconstruct, self.target, self.damping, self.distill, self.rounds)
        return Method(metric, *parts)

    @property
    def holds_out(self) -> bool:
        """Whether reconstructions read statistics of held-out windows."""
        return self.enabled and self.chosen(self.algorithms[0]).holds_out

    @property
    def measures(self) -> bool:
        """Whether loss curves are measured."""
        return self.enabled and self.reads_curves

    @property
    def reads_curves(self) -> bool:
        """Whether the allocator plans by measured loss curves."""
        return ALLOCATORS.get(self.allocator).needs_curves

    def budget(self, sparsity: float) -> Budget:
        """How much to remove."""
        return Budget(sparsity, self.multiple_of, self.min_width, self.min_keep)

    def curve_rounds(self, batch_size: int) -> CurveRounds:
        """How curves are measured, as the library takes it."""
        asked = self.curves
        options = CurveOptions(tuple(sorted(asked.shares, reverse=True)), batch_size)
        return CurveRounds(asked.rounds, asked.num_samples, options, self.allocator)
