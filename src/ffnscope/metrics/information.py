"""Metrics of shared information between channels, or between a channel and the input, under a Gaussian model.

Mutual information of two signals with correlation rho is -ln(1 - rho^2) / 2 nats. Correlations use true variances; a
channel whose variance is below 1e-6 of its power counts as constant and has correlation 0. rho^2 is cut at 1 - 1e-6, so
that a copy of a channel has 6.9 nats; both are what sums of float32 products resolve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.metrics.alignment import covariance
from ffnscope.metrics.redundancy import gaussian_information, inverse_root
from ffnscope.registry import metric
from ffnscope.types import ChannelStats, FFNWeights

SMALL = 512  # covariances up to this size are decomposed whole
ROWS = 1024  # channels whose correlations with all others are held at once


@metric(
    "mutual_information_gaussian",
    needs=("x_sum", "x_outer", "xh_outer", "act_sum", "act_sq"),
    source="arXiv:2604.23475 (baseline), on h per token",
)
def mutual_information_gaussian(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """Gaussian mutual information between a channel and the first principal component of the FFN input, in nats.

    [d_ff]. The component is that of the covariance over tokens; the channel is h itself, after gate and activation.
    Invariant under up * c, down / c.
    """
    value, vector = _leading(covariance(stats, "x_outer", "x_sum"))
    cross = vector @ stats.mean("xh_outer") - (vector @ stats.mean("x_sum")) * stats.mean("act_sum")
    power = stats.mean("act_sq")
    scale = inverse_root(power - stats.mean("act_sum").square(), power)
    along = inverse_root(value, stats.mean("x_outer").diagonal().sum())
    return gaussian_information(cross * scale * along)


@metric(
    "average_redundancy",
    needs=("act_sum", "h_outer"),
    source="arXiv:2604.23475 (baseline), on h per token, all channels",
    natural_sign=-1,
)
def average_redundancy(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """Mean Gaussian mutual information between a channel and every other channel of its site, in nats; negated.

    [d_ff]. The natural value is high for redundant channels; the score is its negative. Invariant under up * c,
    down / c.
    """
    d_ff = stats.site.d_ff
    found: list[Tensor] = []
    for rows in torch.arange(d_ff).split(ROWS):
        shared = gaussian_information(_correlations(stats, rows))
        shared[torch.arange(len(rows)), rows] = 0
        found.append(shared.sum(1))
    return -torch.cat(found) / max(1, d_ff - 1)


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

    [d_ff]. A sampled form of ``average_redundancy``: ``partners`` others per channel, drawn from the seed with
    replacement. Invariant under up * c, down / c.
    """
    if partners < 1:
        raise UsageError(f"pairwise_redundancy_gaussian: partners must be at least 1; got {partners}.")
    d_ff = stats.site.d_ff
    draw = torch.randint(1, max(2, d_ff), (d_ff, partners), generator=torch.Generator().manual_seed(seed))
    others = (torch.arange(d_ff)[:, None] + draw) % d_ff  # never the channel itself
    found = [_correlations(stats, rows).cpu().gather(1, others[rows]) for rows in torch.arange(d_ff).split(ROWS)]
    return -gaussian_information(torch.cat(found)).mean(1)


def _correlations(stats: ChannelStats, rows: Tensor) -> Tensor:
    """Correlations of the channels ``rows`` [n] with all channels; [n, d_ff]."""
    outer, count = stats.total("h_outer"), stats.counts["h_outer"]
    mean, power = stats.mean("act_sum"), outer.diagonal() / count
    scale = inverse_root(power - mean.square(), power)
    rows = rows.to(outer.device)
    return (outer[rows] / count - torch.outer(mean[rows], mean)) * torch.outer(scale[rows], scale)


def _leading(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Largest eigenvalue and its eigenvector."""
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    size = cov.shape[0]
    if size > SMALL and bool(cov.any()):
        start = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        try:
            values, vectors = eigsh(cov.double().cpu().numpy(), k=1, which="LA", v0=start.numpy())
        except ArpackNoConvergence:
            pass  # several almost equal eigenvalues: all are computed below
        else:
            return torch.tensor(values[0]).to(cov), torch.from_numpy(vectors[:, 0].copy()).to(cov)
    found, basis = torch.linalg.eigh(cov)
    return found[-1], basis[:, -1]
