"""Norms of a channel's weights, summed in at least float32 whatever the weights' dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.types import FFNWeights


def check_order(p: float = 2.0) -> None:
    """Raise UsageError unless ``p`` is the order of a norm."""
    if not p >= 1:
        raise UsageError(f"the order p of a norm must be at least 1; got {p:g}.")


def row_norms(weight: Tensor, order: float = 2) -> Tensor:
    """Norm of each row of ``weight`` [d_ff, d_model]: [d_ff]. Pass ``down.T`` for the columns of down."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, order, dim=1, dtype=dtype)


def channel_norms(weights: FFNWeights, order: float = 2) -> Tensor:
    """Norms of every channel's gate row (if there is one), up row and down column: [3 or 2, d_ff]."""
    parts = (weights.gate, weights.up, weights.down.T)
    return torch.stack([row_norms(p, order) for p in parts if p is not None])
