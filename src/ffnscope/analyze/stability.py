"""Would another calibration rank the channels alike? Repeats over seeds and texts, with intervals by document.

Statistics are sums over tokens, so those of a calibration are the sum over its documents. A bootstrap replicate draws
documents with replacement and adds up their sums: no further forward is needed. Metrics whose statistics are too large
to keep per document are compared by value, without an interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.analyze.agreement import Agreement, agreement
from ffnscope.calibrate.collect import PassOptions, calibrate, required_statistics
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.registry import METRICS, STATISTICS
from ffnscope.scoring import score
from ffnscope.types import ChannelStats, FFNSite, Scores

Params = Mapping[str, Mapping[str, Any]]
Parts = Sequence[Mapping[FFNSite, ChannelStats]]
"""Statistics per document."""
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Stability:
    """Agreement of one metric between two calibrations.

    Attributes:
        metric: the metric.
        first: label of one calibration.
        second: label of the other.
        value: agreement of the two score tables.
        spearman_interval: 95 % bootstrap interval over documents, or None where it was not computed: for a metric
            that `has_intervals` excludes, and with fewer than two documents.
        jaccard_interval: likewise.
        documents: number of documents of the two calibrations.
    """

    metric: str
    first: str
    second: str
    value: Agreement
    spearman_interval: tuple[float, float] | None
    jaccard_interval: tuple[float, float] | None
    documents: tuple[int, int]


def has_intervals(metric: str, params: Mapping[str, Any]) -> bool:
    """Whether a metric can be scored from statistics per document: sums of one vector, and no supernode core.

    Second moments and histograms are too large to keep once per document, and a maximum has no weight in a replicate.
    """
    rule = METRICS.get(metric)
    return "core" not in rule.inputs and all(_kept_per_document(name) for name in rule.needed(params))


def per_document(
    model: nn.Module,
    windows: Windows,
    metrics: Params,
    sites: Sequence[FFNSite],
    options: PassOptions | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[dict[FFNSite, ChannelStats]]:
    """Calibrate on each document of ``windows`` apart; their merge is the calibration on all.

    Args:
        model: a causal LM; left as it was.
        windows: calibration text.
        metrics: metric -> parameters; each must have intervals (see `has_intervals`).
        sites: FFNs to observe.
        options: sizes of the passes. ``checkpoint`` is not used; ``gradient_windows`` must be None.
        on_batch: called with (tokens done, tokens in all) after each document.

    Raises:
        UsageError: a metric needs a statistic that is not kept per document; or ``gradient_windows`` is given, which
            chooses windows of the whole text.
    """
    options = replace(options or PassOptions(), checkpoint=None)
    if options.gradient_windows is not None:
        raise UsageError(
            f"gradient_windows = {options.gradient_windows} chooses windows of the whole text, so its documents would "
            "not add up to the calibration on all. Give None, and fewer windows instead."
        )
    for name in required_statistics(metrics):
        if not _kept_per_document(name):
            raise UsageError(
                f"statistic {name!r} is not kept per document (no vector of sums, or it needs the core), so there is "
                "no interval by document for metrics that need it; leave them out (see has_intervals), or compare "
                "their scores by value with compare_scores."
            )
    found: list[dict[FFNSite, ChannelStats]] = []
    done, total = 0, windows.n_tokens
    for document in windows.document.unique().tolist():
        part = windows[windows.document == document]
        found.append(calibrate(model, part, metrics, sites=sites, options=options))
        done += part.n_tokens
        if on_batch is not None:
            on_batch(done, total)
    return found


def combined(parts: Parts, weights: Sequence[int]) -> dict[FFNSite, ChannelStats]:
    """Sum the statistics of documents, each taken ``weights`` times.

    Raises:
        UsageError: no document has a weight above 0, or the numbers of documents and weights differ.
    """
    used = [(w, p) for w, p in zip(weights, parts, strict=False) if w > 0]
    if not used or len(weights) != len(parts):
        raise UsageError(f"{len(parts)} documents need as many weights, one of them above 0; got {list(weights)}.")
    joined: dict[FFNSite, ChannelStats] = {}
    for site in used[0][1]:
        first = used[0][1][site]
        values: dict[str, Tensor] = {}
        for name, value in first.values.items():
            values[name] = torch.zeros_like(value)
            for weight, part in used:
                values[name].add_(part[site].values[name], alpha=weight)
        counts = {k: sum(w * p[site].counts[k] for w, p in used) for k in first.counts}
        joined[site] = ChannelStats(site, values, counts, first.reductions)
    return joined


def stability(
    model: nn.Module,
    calibrations: Mapping[str, Parts],
    metrics: Params,
    *,
    replicates: int = 200,
    seed: int = 0,
    reference: nn.Module | None = None,
) -> list[Stability]:
    """Compare every pair of calibrations under every metric, with intervals over documents.

    A replicate repeats some documents and lacks others, so two replicates agree less than the two calibrations do. The
    interval is therefore the spread of the replicates around their mean, laid around the value.

    Args:
        model: gives the weights.
        calibrations: label -> statistics per document (see `per_document`).
        metrics: metric -> parameters; each must have intervals (see `has_intervals`).
        replicates: bootstrap draws; 0 leaves the intervals out.
        seed: of the draws.
        reference: the model before fine-tuning, for a metric that needs it.

    Raises:
        UsageError: fewer than two calibrations, one without a document, or a metric without intervals.
    """
    _check(calibrations, replicates)
    for name, params in metrics.items():
        if not has_intervals(name, params):
            raise UsageError(
                f"{name!r} cannot be scored from statistics per document (it needs second moments, a maximum, or the "
                "supernode core); compare its scores by value with compare_scores."
            )
    pairs = list(combinations(calibrations, 2))
    found: dict[tuple[str, str, str], list[Agreement]] = {(m, *pair): [] for m in metrics for pair in pairs}
    draws = {label: _draws(len(parts), replicates, seed + i) for i, (label, parts) in enumerate(calibrations.items())}
    for weights in zip(*draws.values(), strict=True):
        joined = {k: combined(parts, w) for (k, parts), w in zip(calibrations.items(), weights, strict=True)}
        for name, params in metrics.items():
            tables = {k: score(model, stats, name, reference=reference, **params) for k, stats in joined.items()}
            for a, b in pairs:
                found[name, a, b].append(agreement(tables[a], tables[b]))
    return [
        _with_intervals(name, a, b, values, (len(calibrations[a]), len(calibrations[b])))
        for (name, a, b), values in found.items()
    ]


def compare_scores(tables: Mapping[str, Scores], documents: Mapping[str, int]) -> list[Stability]:
    """Compare every pair of score tables of one metric by value, without intervals.

    Args:
        tables: label of the calibration -> scores.
        documents: label -> number of documents.

    Raises:
        UsageError: tables of different metrics or sites, or fewer than two.
    """
    names = {one.metric for one in tables.values()}
    if len(names) > 1:
        raise UsageError(f"the tables hold different metrics: {', '.join(sorted(names))}; compare one at a time.")
    if len(tables) < 2:
        raise UsageError(_TOO_FEW)
    return [
        Stability(tables[a].metric, a, b, agreement(tables[a], tables[b]), None, None, (documents[a], documents[b]))
        for a, b in combinations(tables, 2)
    ]


def stability_rows(rows: Sequence[Stability]) -> list[dict[str, Any]]:
    """Flat rows for CSV and JSON."""
    return [
        {
            "metric": row.metric,
            "first": row.first,
            "second": row.second,
            "spearman": row.value.spearman,
            "spearman_low": row.spearman_interval[0] if row.spearman_interval else None,
            "spearman_high": row.spearman_interval[1] if row.spearman_interval else None,
            "top1_jaccard": row.value.jaccard,
            "top1_jaccard_low": row.jaccard_interval[0] if row.jaccard_interval else None,
            "top1_jaccard_high": row.jaccard_interval[1] if row.jaccard_interval else None,
            "documents_first": row.documents[0],
            "documents_second": row.documents[1],
        }
        for row in rows
    ]


_TOO_FEW = "stability needs at least two calibrations: other seeds, or other texts."


def _kept_per_document(statistic: str) -> bool:
    rule = STATISTICS.get(statistic)
    return rule.reduce == "sum" and len(rule.shape) == 1 and not rule.needs_core


def _check(calibrations: Mapping[str, Parts], replicates: int) -> None:
    if len(calibrations) < 2:
        raise UsageError(_TOO_FEW)
    for label, parts in calibrations.items():
        if not parts:
            raise UsageError(f"calibration {label!r} holds no document.")
    if replicates < 0:
        raise UsageError(f"replicates must be at least 0 (0: no intervals); got {replicates}.")


def _draws(n: int, replicates: int, seed: int) -> Iterator[list[int]]:
    """Yield how often each of ``n`` documents is taken: once for the value, then drawn with replacement."""
    yield [1] * n
    random = torch.Generator().manual_seed(seed)
    for _ in range(replicates):
        yield torch.bincount(torch.randint(n, (n,), generator=random), minlength=n).tolist()


def _with_intervals(metric: str, a: str, b: str, found: list[Agreement], documents: tuple[int, int]) -> Stability:
    value, replicates = found[0], found[1:] if min(documents) > 1 else []
    rank = _interval(value.spearman, [f.spearman for f in replicates], -1.0)
    top = _interval(value.jaccard, [f.jaccard for f in replicates], 0.0)
    return Stability(metric, a, b, value, rank, top, documents)


def _interval(value: float | None, replicates: Sequence[float | None], lowest: float) -> tuple[float, float] | None:
    """Percentiles of the replicates, moved so that their mean is the value, within [lowest, 1]; None without any."""
    known = torch.tensor([v for v in replicates if v is not None], dtype=torch.float64)
    if value is None or not len(known):
        return None
    marks = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = (torch.quantile(known, marks) - known.mean() + value).tolist()
    return max(lowest, min(low, value)), min(1.0, max(high, value))
