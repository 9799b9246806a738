"""How the core of a layer reaches the next one: what it writes to, what reads that, and what moves together.

Every number is compared with that of random cores of the same size. Nothing changes when a channel's up row is scaled
by c and its down column by 1/c, because columns are taken times the root mean square of h, and rows by their direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.analyze.neighbours import ALL, Neighbours, find_neighbours, no_neighbour, places_of_core
from ffnscope.analyze.nulls import Comparison, Tail, check_draws, compare, holm, random_sets
from ffnscope.display import html_table
from ffnscope.ffn.offload import materialised
from ffnscope.ffn.projection import weights_of
from ffnscope.metrics.concentration import effective_number
from ffnscope.metrics.redundancy import activation_correlations, core_correlations, top_information
from ffnscope.types import ChannelStats, FFNSite, FFNWeights

NEEDS = ("taylor_sum", "taylor_sq", "act_sum", "act_sq")
CORE_NEEDS = ("act_next", "taylor_next")
BUS, DRIVE, CORRELATION, REDUNDANCY = "bus_dimensions", "drive", "correlation", "redundancy"
Sets = Mapping[FFNSite, Tensor]
OfCores = Callable[[Tensor], Tensor]
"""Places of cores among the measured channels [draws, k] -> one number for each [draws]."""


@dataclass(frozen=True, slots=True)
class CrossLayerRow:
    """One number of one FFN's core against random cores.

    Attributes:
        statistic: bus_dimensions, the effective number (exp of the entropy) of residual dimensions that the core writes
            to, fewer than by chance for a bus; drive, the root mean square over core channels and reading rows of the
            next FFN of row times column, through the norm between them; correlation, the root mean square over core
            channels and next channels of the correlation of h; or redundancy, the mean over next channels of the
            information in q = h g with the most correlated core channels, in nats.
        site: name of the FFN, or "all": the mean over FFNs.
        next_site: name of the next layer's FFN; None where it is not read, and for "all".
        layer: its layer; None for "all".
        comparison: value and null.
        p_adjusted: after Holm, over the FFNs of the same statistic; for "all" it is p.
    """

    statistic: str
    site: str
    next_site: str | None
    layer: int | None
    comparison: Comparison
    p_adjusted: float

    def row(self) -> dict[str, Any]:
        """Flat row for CSV and JSON."""
        head = {"site": self.site, "next_site": self.next_site, "layer": self.layer, "statistic": self.statistic}
        return {**head, **self.comparison.row(), "p_adjusted": self.p_adjusted}


@dataclass(frozen=True, slots=True, eq=False)
class CrossLayer:
    """The result: rows per statistic, one per FFN, then one for all; and FFN -> why something is missing for it."""

    found: Sequence[CrossLayerRow]
    refused: Mapping[str, str] = field(default_factory=dict[str, str])

    def rows(self) -> list[dict[str, Any]]:
        """Flat rows for CSV and JSON."""
        return [one.row() for one in self.found]

    def _repr_html_(self) -> str:
        """Rows over all FFNs, for notebooks."""
        rows = [one.row() for one in self.found if one.site == ALL]
        shown = ("statistic", "value", "null_mean", "effect", "p")
        return html_table({name: [row[name] for row in rows] for name in shown})


@dataclass(frozen=True, slots=True, eq=False)
class _Numbers:
    """A statistic of one FFN: of its core, and of null cores [draws]."""

    value: float
    drawn: Tensor
    following: FFNSite | None


def cross_layer(
    model: nn.Module,
    stats: Mapping[FFNSite, ChannelStats],
    core: Sets,
    measured: Sets,
    *,
    draws: int = 200,
    seed: int = 0,
    on_site: Callable[[int, int], None] | None = None,
) -> CrossLayer:
    """Compare how the core of each FFN reaches the next layer with how random cores do.

    Args:
        model: gives the weights; run once on a few tokens to find the norms.
        stats: act_sum, act_sq, taylor_sum and taylor_sq of all channels; act_next and taylor_next for ``measured``.
        core: site -> channels.
        measured: site -> sorted channels, from which random cores are drawn, the core's among them.
        draws: random cores per FFN, at least 200.
        seed: of the draws.
        on_site: called with (FFNs done, FFNs in all).

    Returns:
        Rows; experts, and layers before one without a dense FFN, have bus_dimensions alone and the reason in
        ``refused``.

    Raises:
        UsageError: too few draws or measured channels, or a statistic is missing.
    """
    check_draws(draws)
    around = find_neighbours(model, list(stats))
    found: dict[str, dict[FFNSite, _Numbers]] = {}
    refused: dict[str, str] = {}
    random = torch.Generator().manual_seed(seed)
    for done, site in enumerate(core, 1):
        if stats[site].n_tokens < 2:
            refused[site.name] = "no token reached it"
        else:
            at = places_of_core(site, core[site], measured[site])
            cores = torch.cat([at[None], random_sets(at.numel(), measured[site].numel(), draws, random)])
            for name, following, of_cores in _statistics(model, stats, (site, measured[site]), around, refused):
                values = of_cores(cores)
                found.setdefault(name, {})[site] = _Numbers(float(values[0]), values[1:], following)
        if on_site:
            on_site(done, len(core))
    return CrossLayer([row for name, numbers in found.items() for row in _rows(name, numbers)], refused)


def _statistics(
    model: nn.Module,
    stats: Mapping[FFNSite, ChannelStats],
    of: tuple[FFNSite, Tensor],
    around: Neighbours,
    refused: dict[str, str],
) -> Iterator[tuple[str, FFNSite | None, OfCores]]:
    site, measured = of
    part, following = stats[site], around.following.get(site)
    with materialised(model, site):
        down = weights_of(model, site).down.detach()
        columns = down.to(torch.promote_types(down.dtype, torch.float32)).cpu().T[measured]
    columns = columns * part.mean("act_sq").sqrt()[measured, None].to(columns)
    yield BUS, None, lambda cores: torch.stack([effective_number(columns[core].abs().sum(0)) for core in cores])
    if following is None or not {*CORE_NEEDS} <= part.values.keys():
        refused[site.name] = no_neighbour(site, around)
        return
    with materialised(model, following):
        rows = _directions(weights_of(model, following), around.norms.get(following))
    power = (columns @ rows.T).double().square().mean(1)
    yield DRIVE, following, lambda cores: power[cores].mean(1).sqrt()
    moved = activation_correlations(part, measured, stats[following]).square().mean(1)
    yield CORRELATION, following, lambda cores: moved[cores].mean(1).sqrt()
    shared = core_correlations(part, measured, stats[following])
    yield REDUNDANCY, following, lambda cores: torch.stack([top_information(shared[core]).mean() for core in cores])


def _directions(weights: FFNWeights, norm: Tensor | None) -> Tensor:
    """Rows of gate and up through the weight of the norm before them, scaled to length 1; [2 d_ff or d_ff, d_model]."""
    rows = torch.cat([w.detach() for w in (weights.gate, weights.up) if w is not None])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).cpu()
    return nn.functional.normalize(rows if norm is None else rows * norm.to(rows), dim=1)


def _rows(statistic: str, numbers: Mapping[FFNSite, _Numbers]) -> list[CrossLayerRow]:
    tail: Tail = "lower" if statistic == BUS else "upper"
    compared = [compare(one.value, one.drawn, tail) for one in numbers.values()]
    adjusted = holm([one.p for one in compared])
    found: list[CrossLayerRow] = []
    for (site, one), against, p in zip(numbers.items(), compared, adjusted, strict=True):
        name = one.following.name if one.following else None
        found.append(CrossLayerRow(statistic, site.name, name, site.layer, against, p))
    mean = sum(one.value for one in numbers.values()) / len(numbers)
    pooled = compare(mean, torch.stack([one.drawn for one in numbers.values()]).mean(0), tail)
    return [*found, CrossLayerRow(statistic, ALL, None, None, pooled, pooled.p)]
