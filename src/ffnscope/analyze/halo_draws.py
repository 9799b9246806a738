"""How redundant the halo of a core is with it, for many cores of one FFN at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnscope.analyze.nulls import matched_sets, random_sets
from ffnscope.metrics.norms import row_norms
from ffnscope.metrics.redundancy import main_dimensions, share_of, top_information
from ffnscope.types import FFNWeights

STATISTICS = ("redundancy", "excess")
CORE_NULLS = ("random_core", "degree_matched", "norm_matched")
LP_NULL = "lp_matched"
CHUNK = 2**24  # entries of shares that are held at once


@dataclass(frozen=True, slots=True, eq=False)
class Followers:
    """Channels that may follow a core: those of its own FFN, or those of the next layer's.

    Attributes:
        correlation: of q of the measured channels with q of the followers, [measured, n].
        sizes: how much each follower writes to (or reads from) each residual dimension, [n, d_model].
        power: E[q^2] of the followers [n], twice the loss proxy.
        own: the measured channels as places among the followers [measured]; None when they are of another FFN.
    """

    correlation: Tensor
    sizes: Tensor
    power: Tensor
    own: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class HaloSize:
    """What a halo is: a share of the followers outside the core, by the core's main dimensions."""

    fraction: float
    support: int
    top: int

    def count(self, followers: Followers, n_core: int) -> int:
        """Channels of a halo."""
        n = followers.power.numel() - (n_core if followers.own is not None else 0)
        return max(1, round(self.fraction * n))


def halo_values(followers: Followers, cores: Tensor, written: Tensor, size: HaloSize) -> tuple[Tensor, Tensor, Tensor]:
    """Redundancy of cores with their own halos.

    Args:
        followers: of all cores.
        cores: places among the measured channels, [draws, k].
        written: |W_down| of the measured channels, [measured, d_model].
        size: of the halos.

    Returns:
        [draws, 2] mean redundancy of the halo (nats), and the same less that of the channels outside halo and core;
        the halo of the last core, sorted; and the redundancy of every follower with it [n].
    """
    count = size.count(followers, cores.shape[1])
    found: list[Tensor] = []
    halo = redundancy = torch.empty(0)
    for part in cores.split(max(1, CHUNK // max(1, followers.sizes.numel()))):
        main = main_dimensions(torch.stack([written[core].sum(0) for core in part]), size.support)
        shares = share_of(followers.sizes, main.to(followers.sizes))
        for core, share in zip(part, shares, strict=True):
            outside = outside_core(followers, core)
            order = torch.sort(share.masked_fill(~outside, -1), descending=True, stable=True).indices
            halo = order[:count]
            redundancy = top_information(followers.correlation[core], size.top)
            found.append(_values(redundancy, halo[None], outside)[0])
    return torch.stack(found), halo.sort().values, redundancy


def matched_values(followers: Followers, core: Tensor, redundancy: Tensor, sets: Tensor) -> Tensor:
    """The same two numbers for other sets of followers of one core; [draws, 2].

    ``sets`` [draws, n_halo] are followers outside the core.
    """
    return _values(redundancy, sets, outside_core(followers, core))


def outside_core(followers: Followers, core: Tensor) -> Tensor:
    """Mask [n] of the followers that are not in the core."""
    outside = torch.ones(followers.power.numel(), dtype=torch.bool, device=followers.power.device)
    if followers.own is not None:
        outside[followers.own[core]] = False
    return outside


def lp_matched_sets(followers: Followers, core: Tensor, halo: Tensor, draws: int, random: torch.Generator) -> Tensor:
    """Followers outside the core whose loss proxies are spread as those of the halo, [draws, n_halo].

    The halo is among those that are drawn from: a null set is then any other choice of as many channels of each bin,
    the halo's own one among them, and the p-value is that of a permutation within bins.
    """
    others = outside_core(followers, core).nonzero().flatten().cpu()
    power = followers.power.cpu()
    return others[matched_sets(power[halo.cpu()], power[others], draws, random)].to(halo.device)


def null_cores(
    weights: FFNWeights, core: Tensor, measured: Tensor, conn: Tensor, draws: int, random: torch.Generator
) -> dict[str, Tensor]:
    """Null cores: places among ``measured``, [draws, k], drawn at random, or matched to the core.

    The core is among those that are drawn from, for the reason that `lp_matched_sets` tells.

    degree_matched: in Conn, the share of its write norm that a channel has in the core's main dimensions [d_ff];
    norm_matched: in the norm of its down column.
    """
    norms = row_norms(weights.down.T).cpu()
    conn, core, measured = conn.cpu(), core.cpu(), measured.cpu()
    matched = [matched_sets(v[core], v[measured], draws, random) for v in (conn, norms)]
    sets: Sequence[Tensor] = (random_sets(core.numel(), measured.numel(), draws, random), *matched)
    return dict(zip(CORE_NULLS, sets, strict=True))


def _values(redundancy: Tensor, halos: Tensor, outside: Tensor) -> Tensor:
    """Mean over each of ``halos`` [draws, n], and that less the mean over the rest of ``outside``; [draws, 2]."""
    inside = redundancy[halos].sum(1)
    count = halos.shape[1]
    rest = int(outside.sum()) - count
    others = (redundancy[outside].sum() - inside) / max(1, rest)
    mean = inside / count
    return torch.stack([mean, mean - others], 1)
