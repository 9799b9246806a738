"""SCAR-Prot and SCAR-Conn: the loss proxy, lowered for channels that repeat what the supernode core already writes.

Ingredients (arXiv:2604.23475): the core is the set of channels with the largest loss proxy; Conn says how much of what
a channel writes goes to the residual dimensions that the core writes to; the write halo is the channels with the
largest Conn; redundancy is the correlation, over tokens, of q = h g with that of core channels.

Where we differ from the public code: correlations divide by true variances, so that redundancy does not change when
the loss is scaled. There an additive 1e-8 under the root swamps products of variances of 1e-13 to 1e-20, so that
"redundancy" mostly repeats the channel's own variance.

Scaling a channel's up row by c and its down column by 1/c changes neither its LP, its redundancy nor its own Conn. Only
through the core's main dimensions, which are sums over the columns of several core channels, can it change a score.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.metrics.ranks import unit_ranks
from ffnscope.metrics.redundancy import connectivity, core_correlations, top_information, write_halo
from ffnscope.registry import metric
from ffnscope.types import ChannelStats, FFNWeights

NEEDS = ("taylor_sum", "taylor_sq", "taylor_core")
SOURCE = "arXiv:2604.23475, with true correlations"


@metric("supernode_protection_score", needs=NEEDS, source=f"{SOURCE} (SCAR-Prot)", inputs=("core",))
def supernode_protection_score(
    stats: ChannelStats,
    weights: FFNWeights,
    *,
    core: Tensor,
    halo_fraction: float = 0.1,
    support: int = 256,
    power: float = 8.0,
    floor: float = 0.2,
) -> Tensor:
    """SCAR-Prot: LP times Protect; [d_ff]. Core channels come first, lifted by the largest LP.

    Protect is 1 outside the write halo, and floor + (1 - floor)(1 - r^power) inside, where r in [0, 1] is the rank of
    the channel's redundancy with the core among the halo. Invariant under up * c, down / c of channels outside the
    core.

    Args:
        stats: statistics that were gathered with this core.
        weights: of the site.
        core: indices of the core channels.
        halo_fraction: share of the other channels that is the write halo.
        support: number of residual dimensions that count as the core's, at most half of d_model.
        power: how sharply protection falls with the rank.
        floor: protection of the most redundant channel.
    """
    conn = connectivity(weights, core, support)
    protect = protection(stats, core, write_halo(conn, core, halo_fraction), power, floor)
    return _core_first(0.5 * stats.mean("taylor_sq") * protect, core)


@metric("supernode_connectivity_score", needs=NEEDS, source=f"{SOURCE} (SCAR-Conn)", inputs=("core",))
def supernode_connectivity_score(
    stats: ChannelStats,
    weights: FFNWeights,
    *,
    core: Tensor,
    halo_fraction: float = 0.1,
    support: int = 256,
    power: float = 8.0,
    floor: float = 0.2,
) -> Tensor:
    """SCAR-Conn: LP times (1 - Conn) + Conn Protect; [d_ff]. Core channels come first, lifted by the largest LP.

    Like ``supernode_protection_score``, with the same arguments, but the protection is weighted by how much the channel
    writes where the core writes. Invariant under up * c, down / c of channels outside the core.
    """
    conn = connectivity(weights, core, support)
    protect = protection(stats, core, write_halo(conn, core, halo_fraction), power, floor)
    conn = conn.to(protect)
    return _core_first(0.5 * stats.mean("taylor_sq") * ((1 - conn) + conn * protect), core)


def redundancy_to_core(stats: ChannelStats, core: Tensor, top: int = 5) -> Tensor:
    """Mean Gaussian information between q of a channel and its ``top`` most correlated core channels, nats; [d_ff].

    Only positive correlations count: a channel that counters the core is not redundant with it.
    """
    core = core.to(stats.total("taylor_core").device)
    _check_core_is_that_of(stats, core)
    return top_information(core_correlations(stats, core), top)


def protection(stats: ChannelStats, core: Tensor, halo: Tensor, power: float, floor: float) -> Tensor:
    """Protect: 1 outside the halo; inside it falls with the rank of the redundancy to ``floor``; [d_ff]."""
    if not 0 <= floor <= 1 or not power > 0:
        raise UsageError(f"floor must be in [0, 1] and power positive; got {floor:g} and {power:g}.")
    redundancy = redundancy_to_core(stats, core)
    halo = halo.to(redundancy.device)
    protect = torch.ones_like(redundancy)
    rank = unit_ranks(redundancy[halo]).to(redundancy)
    protect[halo] = floor + (1 - floor) * (1 - rank.pow(power))
    return protect


def _check_core_is_that_of(stats: ChannelStats, core: Tensor) -> None:
    """Raise when taylor_core belongs to another core: the entry of core channel s with itself is E[q_s^2]."""
    cross, square = stats.mean("taylor_core"), stats.mean("taylor_sq")
    same = cross.shape[0] == core.numel()
    if not same or not torch.allclose(cross.gather(1, core[:, None]).flatten(), square[core], rtol=1e-2, atol=0):
        raise UsageError(
            f"{stats.site.name}: statistic 'taylor_core' was collected for another core than the {core.numel()} "
            "channels given now, or over other text; calibrate with this core and join the statistics again."
        )


def _core_first(score: Tensor, core: Tensor) -> Tensor:
    """Lift the core above all others; its own order, and the scale of the scores, stay."""
    score[core.to(score.device)] += score.max()
    return score
