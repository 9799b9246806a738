"""Metrics that need no text: weight norms, and the random floor."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ffnscope.metrics.norms import channel_norms, check_order
from ffnscope.registry import metric
from ffnscope.types import ChannelStats, FFNWeights


@metric("weight_magnitude", source="arXiv:2604.23475 (baseline)")
def weight_magnitude(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """Sum of the L2 norms of the channel's gate row, up row and down column.

    [d_ff]. Biases are not counted. Changes under up * c, down / c, which leaves the function as it is.
    """
    return channel_norms(weights).sum(0)


@metric(
    "magnitude",
    source="norm product, as in structured magnitude pruning (arXiv:2312.11983, baseline)",
    check=check_order,
)
def magnitude(stats: ChannelStats, weights: FFNWeights, *, p: float = 2.0) -> Tensor:
    """Product of the p-norms of the channel's gate row, up row and down column; [d_ff].

    ``p`` is at least 1. Invariant under up * c, down / c, which leaves the function as it is; the sum is not.
    """
    check_order(p)
    return channel_norms(weights, p).prod(0)


@metric("peak_to_peak", source="OptiPFair 0.4 (PPM, its default for gated FFNs)")
def peak_to_peak(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """OptiPFair's peak-to-peak magnitude, max + |min| of the gate row, plus the same of the up row.

    [d_ff]; in a plain FFN of the up row alone. The down column is not looked at. Changes under up * c, down / c, which
    leaves the function as it is.
    """
    rows = [w for w in (weights.gate, weights.up) if w is not None]
    wide = [w.to(torch.promote_types(w.dtype, torch.float32)) for w in rows]
    return torch.stack([w.amax(1) + w.amin(1).abs() for w in wide]).sum(0)


@metric("random", source="uniform noise, the floor of every comparison")
def random(stats: ChannelStats, weights: FFNWeights, *, seed: int = 0) -> Tensor:
    """Uniform random score, the floor of every comparison; [d_ff], drawn from the seed and the site's name."""
    digest = hashlib.sha256(f"{seed}:{stats.site.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(stats.site.d_ff, generator=generator, dtype=torch.float64)
