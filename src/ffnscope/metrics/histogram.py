"""Quantiles from the fixed log-spaced histogram of absolute activations."""

from __future__ import annotations

import torch
from torch import Tensor

from ffnscope.errors import UsageError

BINS_PER_OCTAVE = 4
FIRST_OCTAVE = -16  # up to 2^16, past the largest float16
BINS = 128


def bin_edges() -> Tensor:
    """Edges of the bins, [BINS + 1] float64: 4 equal steps per octave from 2^-16 to 2^16."""
    steps = torch.arange(BINS + 1, dtype=torch.float64)
    octave = torch.floor(steps / BINS_PER_OCTAVE)
    return torch.exp2(octave + FIRST_OCTAVE) * (1 + (steps / BINS_PER_OCTAVE - octave))


def quantile_from_counts(counts: Tensor, quantile: float) -> Tensor:
    """Return the quantile of each column of ``counts`` [BINS, d_ff]: the geometric middle of the bin that holds it.

    The first bin, which also takes exact zeros, counts as 0. Result [d_ff] float64.

    Raises:
        UsageError: the histogram is empty.
    """
    total = counts.sum(0)
    if int(total.min()) < 1:
        raise UsageError("the activation histogram is empty; calibrate on at least one token.")
    rank = torch.ceil(total.double() * quantile).clamp_min(1)
    reached = counts.cumsum(0) >= rank
    index = reached.int().argmax(0)
    edges = bin_edges().to(counts.device)
    middle = (edges[:-1] * edges[1:]).sqrt()
    middle[0] = 0
    return middle[index]
