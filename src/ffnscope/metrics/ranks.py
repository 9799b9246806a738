"""Ranks of scores, with one rule for ties."""

from __future__ import annotations

import torch
from torch import Tensor


def average_ranks(values: Tensor) -> Tensor:
    """Ranks of a vector from 0, float64; equal values share their average rank."""
    values = values.contiguous()
    ordered = values.sort().values
    low = torch.searchsorted(ordered, values, right=False)
    high = torch.searchsorted(ordered, values, right=True) - 1
    return (low + high).double() / 2


def unit_ranks(values: Tensor) -> Tensor:
    """Average ranks scaled to [0, 1]; one value alone has rank 0."""
    return average_ranks(values) / max(1, values.numel() - 1)
