"""What makes a pruned model: a plan alone, or one with reconstructed weights. Both are applied in the same places."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

from ffnscope.apply.mask import masked
from ffnscope.apply.reconstruction import Reconstruction, reconstructed
from ffnscope.types import PruningPlan

Pruned = PruningPlan | Reconstruction


def plan_of(pruned: Pruned) -> PruningPlan:
    """Which channels stay."""
    return pruned.plan if isinstance(pruned, Reconstruction) else pruned


def as_pruned(model: nn.Module, pruned: Pruned) -> AbstractContextManager[object]:
    """Within the block the model is the pruned one: `masked` by a plan, or `reconstructed`."""
    return reconstructed(model, pruned) if isinstance(pruned, Reconstruction) else masked(model, pruned)


def row_name(pruned: Pruned) -> str:
    """Name for tables: the metric, and how what stays was reconstructed, so that nobody takes one for the other."""
    metric = plan_of(pruned).metric
    return f"{metric} + {pruned.name}" if isinstance(pruned, Reconstruction) else metric
