"""What channels write and read in common with a core, and how redundant they are with it. No metric is registered here.

Correlations use true variances; a channel whose variance is below 1e-6 of its power counts as constant and has
correlation 0. rho^2 is cut at 1 - 1e-6; both are what sums of float32 products resolve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.types import ChannelStats, FFNWeights

RESOLUTION = 1e-6  # relative error of a sum of float32 products


def connectivity(weights: FFNWeights, core: Tensor, support: int) -> Tensor:
    """Conn: the share of a channel's L1 write norm that goes to the core's main residual dimensions; [d_ff].

    The core's main dimensions are the ``support`` ones with the largest sum of |W_down| over its channels. A zero
    column has Conn 0.
    """
    size = weights.down.to(torch.promote_types(weights.down.dtype, torch.float32)).abs()
    main = main_dimensions(size[:, core.to(size.device)].sum(1), support)
    return share_of(size.T, main.to(size)[None])[0]


def main_dimensions(written: Tensor, support: int) -> Tensor:
    """Masks [..., d_model] of the ``support`` dimensions (at most half of them) where ``written`` [..., d_model] is
    largest; ties go to the lower index."""
    if support < 1:
        raise UsageError(f"support must be at least 1 residual dimension; got {support}.")
    n = written.shape[-1]
    order = torch.sort(written, dim=-1, descending=True, stable=True).indices
    main = order[..., : min(support, max(1, n // 2))]
    return torch.zeros_like(written, dtype=torch.bool).scatter_(-1, main, True)


def share_of(sizes: Tensor, masks: Tensor) -> Tensor:
    """Share of each row of ``sizes`` [n, d_model] that is in each of ``masks`` [m, d_model]; [m, n], 0 without size."""
    total = sizes.sum(1)
    share = (masks @ sizes.T) / total.clamp_min(torch.finfo(sizes.dtype).tiny)
    return torch.where(total > 0, share.clamp_max(1), torch.zeros_like(total))


def read_sizes(weights: FFNWeights, norm: Tensor | None) -> Tensor:
    """Sizes |W_gate| + |W_up| of what each channel reads from each residual dimension, times the weight of the norm
    before where it is known; [d_ff, d_model]."""
    size = weights.up.to(torch.promote_types(weights.up.dtype, torch.float32)).abs()
    if weights.gate is not None:
        size = size + weights.gate.to(size).abs()
    return size if norm is None else size * norm.to(size).abs()


def write_halo(conn: Tensor, core: Tensor, fraction: float) -> Tensor:
    """Sorted indices of the ``fraction`` of non-core channels with the largest Conn; ties go to the lower index."""
    if not 0 < fraction <= 1:
        raise UsageError(f"halo_fraction must be in (0, 1], a share of the non-core channels; got {fraction:g}.")
    order = torch.sort(conn, descending=True, stable=True).indices
    outside = order[~torch.isin(order, core.to(order.device))]
    return outside[: max(1, round(fraction * outside.numel()))].sort().values


def core_correlations(stats: ChannelStats, core: Tensor, following: ChannelStats | None = None) -> Tensor:
    """Correlations over tokens of q = h g of core channels with all channels; [core, d_ff], float64.

    With ``following``, the statistics of the next layer's FFN, they are with its channels, [core, next]. A constant
    channel has correlation 0.
    """
    cross = "taylor_core" if following is None else "taylor_next"
    return _correlations((stats, following or stats), core, cross, ("taylor_sum", "taylor_sq"))


def activation_correlations(stats: ChannelStats, core: Tensor, following: ChannelStats) -> Tensor:
    """Correlations over tokens of h of core channels with h of the next layer's channels; [core, next], float64."""
    return _correlations((stats, following), core, "act_next", ("act_sum", "act_sq"))


def _correlations(pair: tuple[ChannelStats, ChannelStats], core: Tensor, name: str, moments: tuple[str, str]) -> Tensor:
    cross = pair[0].mean(name)
    means, squares = ([one.mean(n) for one in pair] for n in moments)
    scales = [inverse_root(square - mean.square(), square) for mean, square in zip(means, squares, strict=True)]
    core = core.to(cross.device)
    return (cross - torch.outer(means[0][core], means[1])) * torch.outer(scales[0][core], scales[1])


def top_information(correlation: Tensor, top: int = 5) -> Tensor:
    """Mean Gaussian information of the ``top`` largest positive correlations [..., core, n] with the core, in nats;
    [..., n]."""
    largest = correlation.clamp_min(0).topk(min(top, correlation.shape[-2]), dim=-2).values
    return gaussian_information(largest).mean(-2)


def gaussian_information(correlation: Tensor) -> Tensor:
    """-ln(1 - rho^2) / 2 in nats, elementwise."""
    return -0.5 * torch.log1p(-correlation.square().clamp_max(1 - RESOLUTION))


def inverse_root(variance: Tensor, power: Tensor) -> Tensor:
    """1 / sqrt(variance), or 0 where the variance is lost in the rounding of the second moment ``power``."""
    tiny = torch.finfo(variance.dtype).tiny
    return torch.where(variance > RESOLUTION * power, variance.clamp_min(tiny).rsqrt(), torch.zeros_like(variance))
