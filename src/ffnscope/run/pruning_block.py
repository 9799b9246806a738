"""The pruning block of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import Field, Strict, StrictBool, model_validator

from ffnscope.apply.method import METHODS, Method, Refit
from ffnscope.run.fields import AllocatorName, Block, Count, Distinct, MetricName, NotEmpty, Share, Sparsity

MethodName = Literal["scores", "best"]


class Pruning(Block):
    """Which metrics prune, and how much."""

    enabled: StrictBool = False
    """Prune and evaluate each algorithm at each sparsity."""
    ratios: Annotated[tuple[Sparsity, ...], NotEmpty, Distinct] = (0.1, 0.3, 0.5)
    """Sparsities: fractions of channels to remove, in [0, 1)."""
    method: MethodName = "scores"
    """Other defaults of what follows; best: obs_loss, halfway (widths differ, stock loaders need local), sequential."""
    algorithms: Annotated[tuple[MetricName, ...], NotEmpty, Distinct] = ("scar_loss_proxy",)
    """Metrics that rank the channels; the lowest are removed."""
    structured: StrictBool = True
    """Remove whole channels (false: not available in this version)."""
    dependency_aware: StrictBool = True
    """Remove a channel from all coupled projections; nothing else is a channel."""
    allocator: AllocatorName = "local"
    """How the sparsity is spread over the FFNs: local (equal everywhere), global (one ranking), halfway, ..."""
    reconstruct: Refit = "none"
    """Refit the down columns of what stays: none, one_shot (from the statistics) or sequential (block by block)."""
    target: Share | None = None
    """Of the sequential one: 0 fits to the FFN's own output, 1 to the dense model's; null: 0.35."""
    damping: Annotated[float, Strict(), Field(gt=0)] | None = None
    """Pull of the refit towards the old weights; null: 0.01 (one_shot), or chosen on held-out windows (sequential)."""
    rounds: Count = 1
    """Remove in this many steps; from the second on, what the one before has left, reconstructed, is ranked."""
    multiple_of: Count = 1
    """Kept widths are multiples of this (kernels like 64 or 128)."""
    min_width: Count = 1
    """No FFN keeps fewer channels than this."""

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

    def chosen(self, metric: str) -> Method:
        """The method with one of the metrics."""
        return Method(metric, self.allocator, self.reconstruct, self.target, self.damping, self.rounds)
