"""Metrics of shared information between channels, or between a channel and the input, under a Gaussian model.

Mutual information of two signals with correlation rho is -ln(1 - rho^2) / 2 nats. Correlations use true variances; a
constant channel has correlation 0. rho^2 is cut at 1 - 1e-12, so that a copy of a channel has a large finite value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.metrics.alignment import covariance
from ffnscope.registry import metric
from ffnscope.types import ChannelStats, FFNWeights

LARGEST = 1 - 1e-12


@metric(
    "mutual_information_gaussian",
    needs=("x_sum", "x_outer", "xh_outer", "act_sum", "act_sq"),
    source="arXiv:2604.23475 (baseline), on h per token",
)
def mutual_information_gaussian(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """Gaussian mutual information between a channel and the first principal component of the FFN input, in nats.

    [d_ff]. The component is that of the covariance over tokens; the channel is h itself, after gate and activation.
    """
    value, vector = _leading(covariance(stats, "x_outer", "x_sum"))
    cross = stats.mean("xh_outer") - torch.outer(stats.mean("x_sum"), stats.mean("act_sum"))
    variance = (stats.mean("act_sq") - stats.mean("act_sum").square()).clamp_min(0)
    return gaussian_information(_correlation((vector @ cross), value, variance))


@metric(
    "average_redundancy",
    needs=("act_sum", "h_outer"),
    source="arXiv:2604.23475 (baseline), on h per token, all channels",
    natural_sign=-1,
)
def average_redundancy(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """Mean Gaussian mutual information between a channel and every other channel of its site, in nats; negated.

    [d_ff]. The natural value is high for redundant channels; the score is its negative.
    """
    shared = gaussian_information(_correlations(stats))
    shared.fill_diagonal_(0)
    return -shared.sum(1) / max(1, shared.shape[0] - 1)


@metric(
    "pairwise_redundancy_gaussian",
    needs=("act_sum", "h_outer"),
    source="arXiv:2604.23475 (baseline), on h per token",
    natural_sign=-1,
)
def pairwise_redundancy_gaussian(
    stats: ChannelStats, weights: FFNWeights, *, partners: int = 10, seed: int = 0
) -> Tensor:
    """Mean Gaussian mutual information between a channel and some random other channels, in nats; negated.

    [d_ff]. A sampled form of ``average_redundancy``: ``partners`` others per channel, drawn from the seed.
    """
    if partners < 1:
        raise UsageError(f"pairwise_redundancy_gaussian: partners must be at least 1; got {partners}.")
    shared = gaussian_information(_correlations(stats))
    d_ff = shared.shape[0]
    draw = torch.randint(1, max(2, d_ff), (d_ff, partners), generator=torch.Generator().manual_seed(seed))
    others = (torch.arange(d_ff)[:, None] + draw) % d_ff  # never the channel itself
    return -shared.gather(1, others.to(shared.device)).mean(1)


def gaussian_information(correlation: Tensor) -> Tensor:
    """-ln(1 - rho^2) / 2 in nats, elementwise."""
    return -0.5 * torch.log1p(-correlation.square().clamp_max(LARGEST))


def _correlations(stats: ChannelStats) -> Tensor:
    cov = covariance(stats, "h_outer", "act_sum")
    variance = _resolved(cov.diagonal(), stats.mean("h_outer").diagonal())
    scale = torch.where(
        variance > 0, variance.clamp_min(torch.finfo(cov.dtype).tiny).rsqrt(), torch.zeros_like(variance)
    )
    return cov * scale[:, None] * scale[None, :]


def _correlation(covariances: Tensor, variance_a: Tensor, variance_b: Tensor) -> Tensor:
    product = variance_a * variance_b
    tiny = torch.finfo(product.dtype).tiny
    return torch.where(product > 0, covariances * product.clamp_min(tiny).rsqrt(), torch.zeros_like(covariances))


def _resolved(variance: Tensor, power: Tensor) -> Tensor:
    """Treat a variance below the rounding of its float32 sums (1e-6 of the second moment) as 0."""
    return torch.where(variance > 1e-6 * power, variance, torch.zeros_like(variance))


def _leading(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Largest eigenvalue and its eigenvector (sign such that its largest entry is positive)."""
    from scipy.sparse.linalg import eigsh

    size = cov.shape[0]
    if size < 3:
        values, vectors = torch.linalg.eigh(cov)
        value, vector = values[-1], vectors[:, -1]
    else:
        start = torch.ones(size, dtype=torch.float64).numpy()
        values, vectors = eigsh(cov.double().cpu().numpy(), k=1, which="LA", v0=start)
        value, vector = torch.tensor(float(values[0]), dtype=torch.float64), torch.from_numpy(vectors[:, 0].copy())
    vector = vector * torch.sign(vector[vector.abs().argmax()])
    return value.to(cov), vector.to(cov)
