"""Concentration: how much of a metric's mass the top channels hold, per FFN and pooled, with intervals by document.

Mass is the natural value of a metric (its score, with the sign that it is told in), which must not be negative: there
is no share of a sum in which terms cancel. A metric with negative values is refused with the reason.

Source: the headline of arXiv:2604.23475 is the median over layers of the share of loss-proxy mass in the top 1 % of
channels. There it has no interval; here the documents of the calibration text are drawn anew where the metric is a
function of sums of vectors (see `Bootstrap`), and left out in turn otherwise (see `repeat_scores`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ffnscope.analyze.bootstrap import Bootstrap, Interval, bootstrap_interval
from ffnscope.analyze.core import lifts_core
from ffnscope.analyze.jackknife import LeftOut, one_sample_interval
from ffnscope.analyze.repeat_passes import is_jackknifed
from ffnscope.analyze.repeats import Repeat
from ffnscope.display import html_table
from ffnscope.errors import UsageError
from ffnscope.metrics.concentration import SHAPES, Tail, lorenz, spread_shape, tail_exponents, tail_fit
from ffnscope.registry import METRICS
from ffnscope.types import FFNSite, Scores

ALL = "all"
ROWS = 16  # draws whose channels are sorted at once
GRID = tuple(i / 100 for i in range(101))
BOUNDS: dict[str, Interval] = {**dict.fromkeys(SHAPES, (0.0, 1.0)), "tail": (1.0, float("inf"))}
LOSS_PROXY = "scar_loss_proxy"
PUBLISHED = "58.7 % for Llama-3.1-8B (arXiv:2604.23475)"


@dataclass(frozen=True, slots=True)
class Spread:
    """How one metric's mass is spread over the channels of one FFN, or of all together.

    Attributes:
        metric: the metric.
        site: name of the FFN, or "all": the channels of all FFNs in one ranking.
        layer: its layer; None for "all".
        n_channels: number of channels.
        values: top1, top5, top10, gini, participation (see `spread_shape`).
        tail: power-law tail, or None where none can be fitted. Its interval is for the same number of channels.
        intervals: 95 % intervals over documents by name, also of "tail"; a name is missing where there is none.
        method: how the intervals were made, or why there are none.
    """

    metric: str
    site: str
    layer: int | None
    n_channels: int
    values: Mapping[str, float]
    tail: Tail | None
    intervals: Mapping[str, Interval]
    method: str

    def row(self) -> dict[str, Any]:
        """Flat row for CSV and JSON; None where there is no number."""
        found: dict[str, Any] = {"metric": self.metric, "site": self.site, "layer": self.layer}
        found["n_channels"] = self.n_channels
        for name in SHAPES:
            low, high = self.intervals.get(name, (None, None))
            found |= {name: self.values[name], f"{name}_low": low, f"{name}_high": high}
        low, high = self.intervals.get("tail", (None, None))
        found |= {"tail_exponent": self.tail.exponent if self.tail else None, "tail_low": low, "tail_high": high}
        found |= {"tail_from": self.tail.smallest if self.tail else None}
        return {**found, "tail_n": self.tail.count if self.tail else None, "method": self.method}


@dataclass(frozen=True, slots=True)
class Median:
    """Median over FFNs of the share that the top 1 % of channels hold, with its interval, least and greatest."""

    value: float
    interval: Interval | None
    least: float
    greatest: float
    n_sites: int


@dataclass(frozen=True, slots=True, eq=False)
class Concentration:
    """The result for several metrics.

    Attributes:
        spreads: one per metric and FFN, then one for all FFNs together.
        medians: metric -> its median over FFNs.
        curves: metric -> site -> Lorenz curve from the top, on the grid 0, 0.01, ..., 1.
        refused: metric, or metric and site -> why it has no row.
        groups: groups of documents that were drawn or left out, at most; 0 = no intervals.
    """

    spreads: Sequence[Spread]
    medians: Mapping[str, Median]
    curves: Mapping[str, Mapping[str, list[float]]]
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    groups: int = 0

    def rows(self) -> list[dict[str, Any]]:
        """Flat rows for CSV and JSON."""
        return [one.row() for one in self.spreads]

    def headline(self, metric: str = LOSS_PROXY) -> str:
        """One sentence: how much the top 1 % of the channels of each FFN hold.

        Raises:
            UsageError: the metric has no rows.
        """
        if metric not in self.medians:
            reason = self.refused.get(metric, "it was not among the scores")
            raise UsageError(f"there is no concentration of {metric!r}: {reason}.")
        one = self.medians[metric]
        interval = "no interval"
        if one.interval is not None:
            interval = f"95 % interval of the median by document {_share(one.interval[0])} to {_share(one.interval[1])}"
        return (
            f"The top 1 % of the channels of each FFN hold a median {_share(one.value)} of its {metric} mass "
            f"({_share(one.least)} to {_share(one.greatest)} over {one.n_sites} FFNs; {interval})."
            + (f" The published median is {PUBLISHED}." if metric == LOSS_PROXY else "")
        )

    def _repr_html_(self) -> str:
        """Pooled rows, for notebooks."""
        rows = [one.row() for one in self.spreads if one.site == ALL]
        shown = ("metric", "n_channels", "top1", "top1_low", "top1_high", "top10", "gini", "participation")
        return html_table({name: [row[name] for row in rows] for name in shown})


def concentration(
    scores: Mapping[str, Scores],
    *,
    bootstrap: Bootstrap | None = None,
    repeat: Repeat | None = None,
    on_metric: Callable[[int, int], None] | None = None,
) -> Concentration:
    """Measure how the mass of each metric is spread over channels.

    Args:
        scores: metric -> scores; parameters are taken from their facts.
        bootstrap: sums by document, for metrics that are functions of sums of vectors.
        repeat: scores without each group of documents (`repeat_scores`), for the intervals of the other metrics.
        on_metric: called with (metrics done, metrics in all).

    Returns:
        Rows per metric and FFN. A metric with negative or no mass is in ``refused``, and so is an expert that no token
        reached.

    Raises:
        UsageError: no scores.
    """
    if not scores:
        raise UsageError("there are no scores whose concentration could be measured: give those of one metric.")
    parts = _Parts([], {}, {}, {})
    for done, one in enumerate(scores.values(), 1):
        _measure(one, bootstrap, repeat, parts)
        if on_metric:
            on_metric(done, len(scores))
    groups = max(bootstrap.groups if bootstrap else 0, len(repeat.shares) if repeat else 0)
    return Concentration(parts.spreads, parts.medians, parts.curves, parts.refused, groups)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Results in the making."""

    spreads: list[Spread]
    medians: dict[str, Median]
    curves: dict[str, dict[str, list[float]]]
    refused: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Others:
    """Natural values on other texts: ``sample(site)`` [n, d_ff], and the interval that numbers [n] of them give."""

    method: str
    sample: Callable[[FFNSite], Tensor] | None = None
    interval: Callable[[float, Tensor, Interval], Interval | None] = lambda value, drawn, bounds: None


def _measure(scores: Scores, bootstrap: Bootstrap | None, repeat: Repeat | None, parts: _Parts) -> None:
    name = scores.metric
    values = _natural(scores, parts.refused)
    if not values:
        return
    others = _others(scores, bootstrap, repeat)
    samples = {site: others.sample(site).float() for site in values} if others.sample else {}
    tops: list[Tensor] = []
    for site, value in values.items():
        spread, drawn = _spread((name, site.name, site.layer), value, samples.get(site), others)
        parts.spreads.append(spread)
        tops += [] if drawn is None else [drawn[:, 0]]
    least, median, greatest = _tops(parts.spreads[-len(values) :])
    interval = others.interval(median, torch.stack(tops).quantile(0.5, dim=0), BOUNDS["top1"]) if tops else None
    parts.medians[name] = Median(median, interval, least, greatest, len(values))
    together = torch.cat([values[site] for site in values])
    everywhere = torch.cat(list(samples.values()), dim=1) if samples else None
    parts.spreads.append(_spread((name, ALL, None), together, everywhere, others)[0])
    parts.curves[name] = {site.name: lorenz(value, GRID) for site, value in values.items()}
    parts.curves[name][ALL] = lorenz(together, GRID)


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _tops(spreads: Sequence[Spread]) -> tuple[float, float, float]:
    """Least, median and greatest share of the top 1 %."""
    values = torch.tensor([one.values["top1"] for one in spreads], dtype=torch.float64)
    return float(values.min()), float(values.quantile(0.5)), float(values.max())


def _spread(
    of: tuple[str, str, int | None], values: Tensor, samples: Tensor | None, others: _Others
) -> tuple[Spread, Tensor | None]:
    """The numbers of one row, and those of the samples [n, 5]."""
    found = dict(zip(SHAPES, spread_shape(values).tolist(), strict=True))
    tail = tail_fit(values)
    intervals: dict[str, Interval | None] = {}
    drawn = None
    if samples is not None:
        rows = samples.split(ROWS)
        drawn = torch.cat([spread_shape(part) for part in rows])
        for i, name in enumerate(SHAPES):
            intervals[name] = others.interval(found[name], drawn[:, i], BOUNDS[name])
        if tail is not None:
            exponents = torch.cat([tail_exponents(part, tail.count) for part in rows])
            intervals["tail"] = others.interval(tail.exponent, exponents, BOUNDS["tail"])
    known = {name: one for name, one in intervals.items() if one is not None}
    return Spread(*of, values.numel(), found, tail, known, others.method), drawn


def _natural(scores: Scores, refused: dict[str, str]) -> dict[FFNSite, Tensor]:
    """Natural values of the FFNs that have mass; why others have none is added to ``refused``."""
    sign = _sign(scores.metric)
    if lifts_core(scores.metric):
        refused[scores.metric] = "its scores lift the core above all other channels, so they are no mass"
        return {}
    found = {site: sign * value.double() for site, value in scores.values.items()}
    negative = [site for site, value in found.items() if bool((value < 0).any())]
    if negative:
        refused[scores.metric] = (
            f"{int((found[negative[0]] < 0).sum())} channels of {negative[0].name} have a negative value, so shares of "
            "a sum are not defined"
        )
        return {}
    for site in [site for site, value in found.items() if not bool(value.any())]:
        unreached = site.name in scores.facts.get("unreached", ())
        refused[f"{scores.metric} of {site.name}"] = "no token reached it" if unreached else "all values are 0"
        del found[site]
    if not found:
        refused[scores.metric] = "no FFN has any mass"
    return found


def _sign(metric: str) -> int:
    return METRICS.get(metric).natural_sign if metric in METRICS.names() else 1


def _others(scores: Scores, bootstrap: Bootstrap | None, repeat: Repeat | None) -> _Others:
    name, sign = scores.metric, _sign(scores.metric)
    registered = name in METRICS.names()
    params: Mapping[str, Any] = scores.facts.get("params", {})
    reason = bootstrap.refusal(name, params) if bootstrap is not None and registered else "no sums by document"
    if reason is None:
        assert bootstrap is not None
        copies, groups = bootstrap.copies(), bootstrap.groups

        def sample(site: FFNSite) -> Tensor:
            return sign * bootstrap.scores(site, name, params, copies)

        return _Others(
            f"bootstrap of {groups} groups of documents",
            sample,
            lambda value, drawn, bounds: bootstrap_interval(value, drawn, groups, bounds),
        )
    if repeat is not None and name in repeat.whole and is_jackknifed(repeat.methods[name]) and repeat.without:
        shares = repeat.shares
        return _Others(
            f"{repeat.methods[name]} of {len(shares)} groups of documents",
            lambda site: sign * torch.stack([one[name].values[site] for one in repeat.without]),
            lambda value, drawn, bounds: _left_out(value, drawn, shares, bounds),
        )
    return _Others(f"none: {reason}")


def _left_out(value: float, drawn: Tensor, shares: Sequence[float], bounds: Interval) -> Interval | None:
    if not bool(torch.isfinite(drawn).all()):
        return None
    return one_sample_interval(value, LeftOut(drawn.tolist(), shares), bounds)
