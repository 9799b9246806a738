"""The supernode core: how far it is the top set of other metrics too, and whether another text would give it.

Overlap has its expectation by chance: two sets of fixed sizes, one of them drawn at random, share a hypergeometric
number of channels. P-values are corrected for the number of FFNs after Holm, per other set.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.analyze.bootstrap import Bootstrap
from ffnscope.analyze.levels import CoreRule
from ffnscope.analyze.nulls import holm
from ffnscope.display import html_table
from ffnscope.errors import UsageError
from ffnscope.registry import METRICS
from ffnscope.types import ChannelStats, FFNSite, Scores

ALL = "all"
OUTLIERS = "activation_outliers"
OUTLIER_METRICS = ("scar_activation_power", "activation_l2_norm", "activation_outlier_index")
"""Metrics that may define activation outliers, the first that was scored: the power of h, else its outlier index."""
SPLITS = 20
Core = Mapping[FFNSite, Tensor]


@dataclass(frozen=True, slots=True)
class Overlap:
    """Channels that the core shares with another set of one FFN, or of all.

    Attributes:
        other: what the other set is the top of.
        site: name of the FFN, or "all".
        layer: its layer; None for "all".
        n_core: channels of the core.
        n_other: channels of the other set.
        shared: channels in both.
        expected: how many a random set of that size shares.
        p: probability that it shares as many or more.
        p_adjusted: after Holm, over the FFNs of the same other set; for "all" it is p.
    """

    other: str
    site: str
    layer: int | None
    n_core: int
    n_other: int
    shared: int
    expected: float
    p: float
    p_adjusted: float

    @property
    def jaccard(self) -> float:
        """Shared over either."""
        return self.shared / (self.n_core + self.n_other - self.shared)

    def row(self) -> dict[str, Any]:
        """Flat row for CSV and JSON."""
        return {
            "site": self.site,
            "layer": self.layer,
            "other": self.other,
            "n_core": self.n_core,
            "n_other": self.n_other,
            "shared": self.shared,
            "expected": self.expected,
            "jaccard": self.jaccard,
            "p": self.p,
            "p_adjusted": self.p_adjusted,
        }


@dataclass(frozen=True, slots=True, eq=False)
class CoreOverlap:
    """Overlap of the core with other top sets.

    Attributes:
        overlaps: per other set, one per FFN, then one for all.
        sets: other set -> its channels per FFN.
        outliers: metric that defined the activation outliers; None when none was scored.
        refused: metric -> why it is not compared.
    """

    overlaps: Sequence[Overlap]
    sets: Mapping[str, Core]
    outliers: str | None
    refused: Mapping[str, str] = field(default_factory=dict[str, str])

    def rows(self) -> list[dict[str, Any]]:
        """Flat rows for CSV and JSON."""
        return [one.row() for one in self.overlaps]

    def _repr_html_(self) -> str:
        """Rows over all FFNs, for notebooks."""
        rows = [one.row() for one in self.overlaps if one.site == ALL]
        shown = ("other", "n_core", "shared", "expected", "jaccard", "p")
        return html_table({name: [row[name] for row in rows] for name in shown})


def core_overlap(core: Core, scores: Mapping[str, Scores], *, defined_by: str | None = None) -> CoreOverlap:
    """Compare the core with the top set of every other metric, of the core's size, and with the activation outliers.

    Activation outliers are the top channels by the mean square of h (scar_activation_power or activation_l2_norm, which
    rank alike), or where neither was scored by activation_outlier_index. Metrics that lift the core (SCAR-Prot) have
    a set, but no row.

    Args:
        core: site -> channels (see `top_core`).
        scores: metric -> scores of the same FFNs.
        defined_by: metric that the core is the top of, which is not compared with itself.

    Raises:
        UsageError: no FFN, or scores of other FFNs.
    """
    if not core:
        raise UsageError("the core is of no FFN, so there is nothing to compare; see top_core.")
    for name, one in scores.items():
        if not set(core) <= set(one.values):
            raise UsageError(f"scores of {name!r} lack FFNs of the core; score the same layers by all metrics.")
    outliers = next((name for name in OUTLIER_METRICS if name in scores), None)
    tops = {name: _tops(one, core) for name, one in scores.items()}
    if outliers is not None:
        tops = {OUTLIERS: tops[outliers], **tops}
    refused = {name: "its scores lift the core above all other channels" for name in scores if lifts_core(name)}
    compared = {name: other for name, other in tops.items() if name != defined_by and name not in refused}
    found = [row for name, other in compared.items() for row in _overlaps(name, core, other)]
    return CoreOverlap(found, tops, outliers, refused)


def lifts_core(metric: str) -> bool:
    """Whether a metric puts the core above all other channels, so that its top set is the core by construction."""
    return metric in METRICS.names() and "core" in METRICS.get(metric).inputs


def _tops(scores: Scores, core: Core) -> dict[FFNSite, Tensor]:
    """Top channels of each FFN, as many as its core has; ties go to the lower index."""
    orders = {site: torch.sort(scores.values[site], descending=True, stable=True).indices for site in core}
    return {site: orders[site][: index.numel()].sort().values for site, index in core.items()}


def _overlaps(name: str, core: Core, other: Core) -> list[Overlap]:
    sizes = [(site.d_ff, index.numel(), other[site].numel()) for site, index in core.items()]
    shared = [int(torch.isin(index, other[site]).sum()) for site, index in core.items()]
    laws = [_law(*size) for size in sizes]
    tails = [_upper(law, n) for law, n in zip(laws, shared, strict=True)]
    rows = [
        Overlap(name, site.name, site.layer, n_core, n_other, both, n_core * n_other / width, p, adjusted)
        for site, (width, n_core, n_other), both, p, adjusted in zip(
            core, sizes, shared, tails, holm(tails), strict=True
        )
    ]
    together = laws[0]
    for law in laws[1:]:
        together = _convolved(together, law)
    p = _upper(together, sum(shared))
    counts = sum(r.n_core for r in rows), sum(r.n_other for r in rows), sum(shared)
    return [*rows, Overlap(name, ALL, None, *counts, sum(r.expected for r in rows), p, p)]


def _law(width: int, n_core: int, n_other: int) -> Tensor:
    """Probability of 0, 1, ... shared channels."""
    from scipy.stats import hypergeom

    most = min(n_core, n_other)
    return torch.from_numpy(hypergeom.pmf(range(most + 1), width, n_core, n_other))


def _convolved(a: Tensor, b: Tensor) -> Tensor:
    """Law of the sum of two independent counts."""
    import numpy

    return torch.from_numpy(numpy.convolve(a.numpy(), b.numpy()))


def _upper(law: Tensor, count: int) -> float:
    """Probability of ``count`` or more."""
    return min(1.0, float(law[count:].flip(0).cumsum(0)[-1]))


@dataclass(frozen=True, slots=True)
class CoreShift:
    """Overlap of the core with the core that another text, seed or half of the documents gives.

    Attributes:
        compared: "halves", "seed N" or the name of a text.
        site: name of the FFN, or "all": the median over FFNs.
        layer: its layer; None for "all".
        jaccard: shared over either; for halves, the mean over several splits.
        shared: channels in both; likewise.
        n_core: channels of the core.
    """

    compared: str
    site: str
    layer: int | None
    jaccard: float
    shared: float
    n_core: float

    def row(self) -> dict[str, Any]:
        """Flat row for CSV and JSON."""
        found = {"compared": self.compared, "site": self.site, "layer": self.layer}
        return {**found, "jaccard": self.jaccard, "shared": self.shared, "n_core": self.n_core}


@dataclass(frozen=True, slots=True, eq=False)
class CoreStability:
    """How stable the core is.

    Attributes:
        shifts: per comparison, one per FFN, then the median over FFNs.
        skipped: comparison -> why it was not made.
    """

    shifts: Sequence[CoreShift]
    skipped: Mapping[str, str] = field(default_factory=dict[str, str])

    def rows(self) -> list[dict[str, Any]]:
        """Flat rows for CSV and JSON."""
        return [one.row() for one in self.shifts]

    def _repr_html_(self) -> str:
        """Medians, for notebooks."""
        rows = [one.row() for one in self.shifts if one.site == ALL]
        return html_table({name: [row[name] for row in rows] for name in ("compared", "jaccard", "shared", "n_core")})


def core_stability(
    core: Core,
    others: Mapping[str, Core],
    *,
    rule: CoreRule | None = None,
    model: nn.Module | None = None,
    stats: Mapping[FFNSite, ChannelStats] | None = None,
    seed: int = 0,
) -> CoreStability:
    """Compare the core with those of other calibrations, and with those of the two halves of its own documents.

    A half has half of the text, so agreement between halves is lower than between two texts of full length. It is the
    mean over 20 random splits of the groups of documents, of the core of one half with that of the other.

    Args:
        core: site -> channels.
        others: label, such as "seed 1" or the name of a text -> the core that another calibration gives.
        rule: what defines the core; with ``model`` and ``stats``, which hold the sums by document of its metric (see
            `bootstrap_statistics`), halves are compared. Left out: they are not.
        model: gives the weights.
        stats: of the calibration that gave ``core``.
        seed: of the splits.

    Raises:
        UsageError: a core of other FFNs.
    """
    shifts: list[CoreShift] = []
    skipped: dict[str, str] = {}
    for label, other in others.items():
        if set(other) != set(core):
            raise UsageError(f"the core of {label!r} is of other FFNs; calibrate the same layers of one model.")
        shifts += _shifts(label, [(core, other)])
    if rule is not None and model is not None and stats is not None:
        sums = Bootstrap(model, stats, seed=seed)
        reason = sums.refusal(rule.metric, rule.params)
        if reason is None:
            shifts += _shifts("halves", _halves(core, rule, sums))
        else:
            skipped["halves"] = f"{rule.metric}: {reason}"
    return CoreStability(shifts, skipped)


def _halves(core: Core, rule: CoreRule, sums: Bootstrap) -> list[tuple[Core, Core]]:
    """Cores of both halves for each split; FFNs of which a half has no token are left out."""
    random = torch.Generator().manual_seed(sums.seed)
    masks = [torch.randperm(sums.groups, generator=random) < sums.groups // 2 for _ in range(SPLITS)]
    copies = torch.stack([half for mask in masks for half in (mask, ~mask)]).double()
    pairs: list[tuple[dict[FFNSite, Tensor], dict[FFNSite, Tensor]]] = [({}, {}) for _ in masks]
    for site, index in core.items():
        values = sums.scores(site, rule.metric, rule.params, copies)
        if not bool(torch.isfinite(values).all()):
            continue
        tops = torch.sort(values, dim=1, descending=True, stable=True).indices[:, : index.numel()]
        for i, pair in enumerate(pairs):
            pair[0][site], pair[1][site] = tops[2 * i], tops[2 * i + 1]
    return list(pairs)


def _shifts(compared: str, pairs: Sequence[tuple[Core, Core]]) -> list[CoreShift]:
    rows: list[CoreShift] = []
    for site in pairs[0][0]:
        sizes = [(int(torch.isin(a[site], b[site]).sum()), a[site].numel(), b[site].numel()) for a, b in pairs]
        shared = statistics.fmean(both for both, _, _ in sizes)
        jaccard = statistics.fmean(both / (n + m - both) for both, n, m in sizes)
        rows.append(CoreShift(compared, site.name, site.layer, jaccard, shared, sizes[0][1]))
    if not rows:
        return []
    middle = [statistics.median(getattr(row, name) for row in rows) for name in ("jaccard", "shared", "n_core")]
    return [*rows, CoreShift(compared, ALL, None, *middle)]
