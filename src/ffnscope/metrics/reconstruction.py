"""Metrics of how badly the FFN output would be rebuilt without a channel."""

from __future__ import annotations

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.registry import metric
from ffnscope.types import ChannelStats, FFNWeights


@metric("sparsegpt", needs=("h_outer",), source="arXiv:2301.00774, channel form: structured OBS score")
def sparsegpt(stats: ChannelStats, weights: FFNWeights, *, damping: float = 0.01) -> Tensor:
    """Structured OBS score, ||W_down[:, j]||^2 / [H^-1]_jj with H = E[h h^T] + damping mean(diag H) I.

    [d_ff]: the squared error of the FFN output when channel j is removed and the others are refitted by least squares.
    Only a score: weights are not updated here. Changes under up * c, down / c, because the damping adds a power that
    does not scale with the channel; without damping it would be invariant.
    """
    if not 0 < damping < float("inf"):
        raise UsageError(f"sparsegpt: damping must be positive, a share of the mean of diag H; got {damping:g}.")
    second = stats.mean("h_outer")
    scale = second.diagonal().mean()
    if float(scale) == 0:
        return torch.zeros_like(second.diagonal())
    second.diagonal().add_(damping * scale)  # a mean is a new tensor
    factor, failed = torch.linalg.cholesky_ex(second)
    if int(failed):
        raise UsageError(
            f"{stats.site.name}: the second moment of the channels is not positive definite; raise sparsegpt.damping "
            f"above {damping:g}."
        )
    return _column_power(weights).to(second) / torch.cholesky_inverse(factor).diagonal()


@metric("flap", needs=("act_sum", "act_sq"), source="arXiv:2312.11983 (WIFV)")
def flap(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """Fluctuation times norm, Var(h_j) ||W_down[:, j]||^2; [d_ff].

    The mean square change of the FFN output when the channel is replaced by its mean (FLAP adds that mean to the bias
    of down; here is only the score). Invariant under up * c, down / c. For the error of the variance see
    ``activation_variance``.
    """
    variance = (stats.mean("act_sq") - stats.mean("act_sum").square()).clamp_min(0)
    return variance * _column_power(weights).to(variance)


def _column_power(weights: FFNWeights) -> Tensor:
    down = weights.down.to(torch.promote_types(weights.down.dtype, torch.float32))
    return down.square().sum(0)
