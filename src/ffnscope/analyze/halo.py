"""Write halo and read halo: are the channels around a core more redundant with it than around other cores?

The write halo of a core are the channels of its FFN that write to the core's main residual dimensions, the read halo
those of the next layer's FFN that read them. Redundancy is the information between q = h g of a channel and of its
most correlated core channels, from true variances in float64 (arXiv:2604.23475 divides by variances plus 1e-8, which
is larger than they are).

Four nulls, each of many draws: another core of the same size at random, or matched to the core in degree (Conn) or in
the norm of its down columns, each with its own halo; and the same core with other followers, matched to the halo in
loss proxy. A core matched in loss proxy does not exist, because the core is the top by it. Every null set is drawn
from channels that the set itself is among, so each p-value is that of a permutation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.analyze.halo_draws import (
    LP_NULL,
    STATISTICS,
    Followers,
    HaloSize,
    halo_values,
    lp_matched_sets,
    matched_values,
    null_cores,
)
from ffnscope.analyze.neighbours import ALL, Neighbours, find_neighbours, no_neighbour, places_of_core
from ffnscope.analyze.nulls import Comparison, check_draws, compare, holm
from ffnscope.display import html_table
from ffnscope.errors import UsageError
from ffnscope.ffn.offload import materialised
from ffnscope.ffn.projection import weights_of
from ffnscope.metrics.redundancy import connectivity, core_correlations, read_sizes
from ffnscope.types import ChannelStats, FFNSite, FFNWeights

NEEDS = ("taylor_sum", "taylor_sq")
CORE_NEEDS = ("taylor_core", "taylor_next")
ENOUGH = 10  # tokens per core channel
Sets = Mapping[FFNSite, Tensor]


@dataclass(frozen=True, slots=True)
class HaloOptions:
    """What a halo is, and what it is compared with.

    Attributes:
        fraction: share of the channels outside the core that is the write halo; of the next FFN's, the read halo.
        support: residual dimensions that count as the core's, at most half of d_model.
        top: core channels, the most correlated ones, that redundancy is a mean over.
        draws: null draws, at least 200.
        seed: of the draws.

    Raises:
        UsageError: a value that is not possible.
    """

    fraction: float = 0.1
    support: int = 256
    top: int = 5
    draws: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        check_draws(self.draws)
        if not 0 < self.fraction <= 0.5:
            raise UsageError(
                f"the halo must be a share in (0, 0.5] of the channels, so that as many others are left to compare it "
                f"with; got {self.fraction:g}."
            )
        if self.support < 1 or self.top < 1:
            raise UsageError(f"support and top must be at least 1; got {self.support} and {self.top}.")


@dataclass(frozen=True, slots=True)
class HaloRow:
    """One number of a halo against one null.

    Attributes:
        halo: "write" or "read".
        null: random_core, degree_matched, norm_matched or lp_matched.
        statistic: "redundancy", the mean over the halo in nats; or "excess", that less the mean over the other channels
            outside the core.
        site: name of the core's FFN, or "all": the mean over FFNs.
        layer: its layer; None for "all".
        n_halo: channels of the halo (of all FFNs for "all").
        comparison: value and null.
        p_adjusted: after Holm, over the FFNs of the same halo, null and statistic; for "all" it is p.
        tokens: predicted tokens behind the correlations, the fewest for "all".
        overlap: share of a null set that is the core's (for lp_matched the halo's) own, mean over draws. The larger it
            is, the less can the value stand out.
    """

    halo: str
    null: str
    statistic: str
    site: str
    layer: int | None
    n_halo: int
    comparison: Comparison
    p_adjusted: float
    tokens: int
    overlap: float

    def row(self) -> dict[str, Any]:
        """Flat row for CSV and JSON."""
        head = {"halo": self.halo, "null": self.null, "statistic": self.statistic}
        head |= {"site": self.site, "layer": self.layer, "n_halo": self.n_halo}
        return {
            **head,
            **self.comparison.row(),
            "p_adjusted": self.p_adjusted,
            "tokens": self.tokens,
            "null_overlap": self.overlap,
        }


@dataclass(frozen=True, slots=True, eq=False)
class HaloAnalysis:
    """Halos of all FFNs.

    Attributes:
        found: rows per halo, null and statistic: one per FFN, then one for all.
        write_halo: site -> channels of its FFN, sorted.
        read_halo: site of the core -> channels of the next layer's FFN, sorted.
        next_sites: site -> FFN of the next layer, for those with a read halo.
        refused: site, or site and halo -> why it has no rows.
        few_tokens: site -> its tokens, where there are fewer than 10 per core channel.
    """

    found: Sequence[HaloRow]
    write_halo: Sets
    read_halo: Sets
    next_sites: Mapping[FFNSite, FFNSite]
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    few_tokens: Mapping[str, int] = field(default_factory=dict[str, int])

    def rows(self) -> list[dict[str, Any]]:
        """Flat rows for CSV and JSON."""
        return [one.row() for one in self.found]

    def _repr_html_(self) -> str:
        """Rows over all FFNs, for notebooks."""
        rows = [one.row() for one in self.found if one.site == ALL]
        shown = ("halo", "null", "statistic", "value", "null_mean", "effect", "p")
        return html_table({name: [row[name] for row in rows] for name in shown})


def halo_analysis(
    model: nn.Module,
    stats: Mapping[FFNSite, ChannelStats],
    core: Sets,
    measured: Sets,
    options: HaloOptions | None = None,
    *,
    on_site: Callable[[int, int], None] | None = None,
) -> HaloAnalysis:
    """Compare the halos of a core with those of null cores, and with matched other channels.

    Args:
        model: gives the weights; run once on a few tokens to find the norms.
        stats: taylor_sum and taylor_sq of all channels; taylor_core, and for the read halo taylor_next, for the
            channels ``measured``.
        core: site -> channels.
        measured: site -> sorted channels, from which null cores are drawn, the core's among them (`null_channels`).
        options: sizes and draws.
        on_site: called with (FFNs done, FFNs in all).

    Raises:
        UsageError: a core channel was not measured, or too few others were; or a statistic is missing.
    """
    options = options or HaloOptions()
    around = find_neighbours(model, list(stats))
    parts: dict[tuple[str, FFNSite], _Part] = {}
    refused: dict[str, str] = {}
    tokens: dict[FFNSite, int] = {}
    sites = list(core)
    random = torch.Generator().manual_seed(options.seed)
    for done, site in enumerate(sites, 1):
        count = stats[site].counts.get("taylor_sum", stats[site].n_tokens)
        if count < 2:
            refused[site.name] = "no token reached it"
        else:
            tokens[site] = count
            given = _Given(model, stats, core[site], measured[site], options, random)
            for halo, part in given.parts(site, around, refused):
                parts[halo, site] = part
        if on_site:
            on_site(done, len(sites))
    few = {s.name: n for s, n in tokens.items() if n < ENOUGH * core[s].numel()}
    _warn(few, core)
    rows = [row for halo in ("write", "read") for row in _rows(halo, parts, tokens)]
    write, read = ({s: part.halo for (h, s), part in parts.items() if h == halo} for halo in ("write", "read"))
    return HaloAnalysis(rows, write, read, {s: around.following[s] for s in read}, refused, few)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One halo of one FFN: its channels, the two numbers [2], those of each null [draws, 2], and what they share."""

    halo: Tensor
    values: Tensor
    nulls: Mapping[str, Tensor]
    overlaps: Mapping[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """What the halos of one FFN are computed from."""

    model: nn.Module
    stats: Mapping[FFNSite, ChannelStats]
    core: Tensor
    measured: Tensor
    options: HaloOptions
    random: torch.Generator

    def parts(self, site: FFNSite, around: Neighbours, refused: dict[str, str]) -> Iterator[tuple[str, _Part]]:
        """The write halo, and the read halo where there is one."""
        at = places_of_core(site, self.core, self.measured)
        with materialised(self.model, site):
            weights = weights_of(self.model, site)
            written = weights.down.detach().to(torch.promote_types(weights.down.dtype, torch.float32)).abs().cpu().T
            cores = self._cores(weights)
        own = Followers(core_correlations(self.stats[site], self.measured), written, self._power(site), self.measured)
        yield "write", self._part(own, at, cores, written[self.measured])
        following = around.following.get(site)
        if following is None or "taylor_next" not in self.stats[site].values:
            refused[f"{site.name} read"] = no_neighbour(site, around)
            return
        with materialised(self.model, following):
            read = read_sizes(weights_of(self.model, following), around.norms.get(following)).detach().cpu()
        correlation = core_correlations(self.stats[site], self.measured, self.stats[following])
        yield (
            "read",
            self._part(Followers(correlation, read, self._power(following), None), at, cores, written[self.measured]),
        )

    def _power(self, site: FFNSite) -> Tensor:
        return self.stats[site].mean("taylor_sq")

    def _cores(self, weights: FFNWeights) -> dict[str, Tensor]:
        """Null cores, as places among the measured channels."""
        conn = connectivity(weights, self.core, self.options.support).detach()
        return null_cores(weights, self.core, self.measured, conn, self.options.draws, self.random)

    def _part(self, followers: Followers, at: Tensor, cores: Mapping[str, Tensor], written: Tensor) -> _Part:
        size = HaloSize(self.options.fraction, self.options.support, self.options.top)
        values, halo, redundancy = halo_values(followers, at[None], written, size)
        nulls = {name: halo_values(followers, places, written, size)[0] for name, places in cores.items()}
        sets = lp_matched_sets(followers, at, halo, self.options.draws, self.random)
        nulls[LP_NULL] = matched_values(followers, at, redundancy, sets)
        overlaps = {name: _shared(places, at) for name, places in cores.items()} | {LP_NULL: _shared(sets, halo)}
        return _Part(halo, values[0], nulls, overlaps)


def _shared(sets: Tensor, own: Tensor) -> float:
    """Share of the entries of ``sets`` that are in ``own``."""
    return float(torch.isin(sets, own).double().mean())


def _rows(halo: str, parts: Mapping[tuple[str, FFNSite], _Part], tokens: Mapping[FFNSite, int]) -> list[HaloRow]:
    here = {site: part for (name, site), part in parts.items() if name == halo}
    if not here:
        return []
    found: list[HaloRow] = []
    counts = {site: part.halo.numel() for site, part in here.items()}
    for null in next(iter(here.values())).nulls:
        for i, statistic in enumerate(STATISTICS):
            compared = {s: compare(float(p.values[i]), p.nulls[null][:, i]) for s, p in here.items()}
            adjusted = holm([one.p for one in compared.values()])
            for (site, one), p in zip(compared.items(), adjusted, strict=True):
                head = halo, null, statistic, site.name, site.layer, counts[site]
                found.append(HaloRow(*head, one, p, tokens[site], here[site].overlaps[null]))
            mean = sum(one.value for one in compared.values()) / len(here)
            draws = torch.stack([p.nulls[null][:, i] for p in here.values()]).mean(0)
            pooled = compare(mean, draws)
            head = halo, null, statistic, ALL, None, sum(counts.values())
            shared = sum(p.overlaps[null] for p in here.values()) / len(here)
            found.append(HaloRow(*head, pooled, pooled.p, min(tokens[s] for s in here), shared))
    return found


def _warn(few: Mapping[str, int], core: Sets) -> None:
    if not few:
        return
    name, count = min(few.items(), key=lambda item: item[1])
    size = next(index.numel() for site, index in core.items() if site.name == name)
    warnings.warn(
        f"correlations with the core of {name} rest on {count:,} tokens for {size} core channels (and {len(few) - 1} "
        f"more FFNs have as few); fewer than {ENOUGH} per core channel do not determine them. Calibrate on more text.",
        stacklevel=3,
    )
