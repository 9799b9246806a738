"""What a cut does to the logits of the tiny models of every architecture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ffnscope.apply.mask import masked
from ffnscope.types import PruningPlan
from tiny_all import logits_of


def distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return float((a - b).abs().max())


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Logits of a short text."""
    return logits_of(model)


def masked_logits(model: Any, plan: PruningPlan) -> Tensor:
    """Logits under the mask of a plan."""
    with masked(model, plan):
        return logits(model)
