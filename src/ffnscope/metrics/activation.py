"""Metrics of channel activations h (the input of the down projection), over calibration tokens.

All are means over tokens, so neither the amount nor a duplication of text changes their scale. The public NodeLens code
computes several of these names on token-averaged pre-activations of whichever projection comes first; here every one
of them reads h itself.

Scaling a channel's up row (and bias) by c > 0 and its down column by 1/c leaves a gated FFN as it is, but makes h
c times larger. Each docstring tells what that does to the score: a metric that changes ranks channels partly by an
arbitrary choice of units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ffnscope.metrics.histogram import quantile_from_counts
from ffnscope.metrics.norms import row_norms
from ffnscope.registry import metric
from ffnscope.types import ChannelStats, FFNWeights

QUANTILE = 0.999


@metric("activation_l2_norm", needs=("act_sq",), source="arXiv:2604.23475 (baseline), on h per token")
def activation_l2_norm(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """Root mean square activation, sqrt(E[h^2]).

    [d_ff]. The L2 norm over tokens divided by the square root of their number, so that text length cancels. Scales with
    c under up * c, down / c.
    """
    return stats.mean("act_sq").sqrt()


@metric("activation_mean", needs=("act_abs",), source="arXiv:2604.23475 (baseline), on h per token")
def activation_mean(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """Mean absolute activation, E[|h|].

    [d_ff]. The absolute value is taken per token, so signs do not cancel. Scales with c under up * c, down / c.
    """
    return stats.mean("act_abs")


@metric("minitron", needs=("act_window_sq",), source="arXiv:2407.14679 (Minitron), as in NVIDIA's released code")
def minitron(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """Minitron's activation score, the L2 norm over windows of the mean of |h| over a window's tokens.

    [d_ff]. Divided by the square root of the number of tokens, so that text length cancels. Depends on how text is cut
    into windows, but not on batches. Scales with c under up * c, down / c.
    """
    return stats.mean("act_window_sq").sqrt()


@metric("activation_variance", needs=("act_sum", "act_sq"), source="arXiv:2604.23475 (baseline), on h per token")
def activation_variance(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """Variance of the activation over tokens, E[h^2] - E[h]^2.

    [d_ff], population form. Computed from sums: its absolute error is about 1e-6 of E[h^2] for a float32 model, so the
    variance of a nearly constant channel is only known to that precision; negative rounding is clamped to 0. Scales
    with c^2 under up * c, down / c.
    """
    return (stats.mean("act_sq") - stats.mean("act_sum").square()).clamp_min(0)


@metric("activation_outlier_index", needs=("act_hist", "act_abs"), source="arXiv:2604.23475 (baseline), on h per token")
def activation_outlier_index(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """Outlier index, the 99.9 % quantile of |h| over its mean.

    [d_ff]; 0 for a channel that is never active. The quantile comes from a fixed histogram of every 32nd token and is
    the geometric middle of its bin: bins span at most a factor 1.25, so the quantile is within 12 % of the sample's.
    Below 1,000 histogram tokens (32,000 of calibration) it is the largest bin seen. Values under 2^-16 or over 2^16
    fall into the end bins.
    Invariant under up * c, down / c, to the same 12 %.
    """
    mean = stats.mean("act_abs")
    quantile = quantile_from_counts(stats.total("act_hist"), QUANTILE)
    return torch.where(mean > 0, quantile / mean.clamp_min(torch.finfo(mean.dtype).tiny), torch.zeros_like(mean))


@metric("wanda", needs=("act_sq",), source="arXiv:2306.11695 (channel form: summed over output rows)")
def wanda(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """Wanda, channel form: sqrt(E[h^2]) times the L1 norm of the channel's down column.

    [d_ff]. The sum over output rows of Wanda's |W_ij| * ||x_j||, with the norm over tokens divided by the square root
    of their number. Reads the down projection only: its input norms are those of one signal, so terms are comparable.
    Invariant under up * c, down / c.
    """
    return stats.mean("act_sq").sqrt() * row_norms(weights.down.T, 1)
