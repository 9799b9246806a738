"""Would another calibration rank the channels alike? Repeats over seeds and texts, with intervals by document.

Statistics are sums over tokens, so those of a calibration are the sum over its documents. A bootstrap replicate draws
documents with replacement and adds up their sums: no further forward is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.analyze.agreement import Agreement, agreement
from ffnscope.calibrate.collect import PassOptions, calibrate, required_statistics, statistics_bytes
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.registry import METRICS, STATISTICS
from ffnscope.scoring import score
from ffnscope.types import ChannelStats, FFNSite, Scores

Params = Mapping[str, Mapping[str, Any]]
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Stability:
    """Agreement of one metric between two calibrations.

    Attributes:
        metric: the metric.
        first: label of one calibration.
        second: label of the other.
        value: agreement of the two score tables.
        spearman_interval: 95 % bootstrap interval over documents, or None where it was not computed.
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


def per_document(
    model: nn.Module,
    windows: Windows,
    metrics: Params,
    sites: Sequence[FFNSite],
    options: PassOptions | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[dict[FFNSite, ChannelStats]]:
    """Calibrate on each document of ``windows`` apart; their merge is the calibration on all.

    Raises:
        UsageError: a metric needs a maximum, or second moments, which are too large to keep per document.
    """
    names = required_statistics(metrics)
    for name in names:
        rule = STATISTICS.get(name)
        if rule.reduce != "sum" or len([n for n in rule.shape if n in ("d_ff", "d_model", "core")]) > 1:
            size = statistics_bytes(sites, [name]) / 2**20
            raise UsageError(
                f"statistic {name!r} ({size:,.0f} MiB) is not kept per document, so there is no interval by document "
                "for metrics that need it; leave them out."
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


def combined(parts: Sequence[Mapping[FFNSite, ChannelStats]], weights: Sequence[int]) -> dict[FFNSite, ChannelStats]:
    """Sum the statistics of documents, each taken ``weights`` times."""
    used = [(w, p) for w, p in zip(weights, parts, strict=True) if w]
    joined: dict[FFNSite, ChannelStats] = {}
    for site in used[0][1]:
        first = used[0][1][site]
        values: dict[str, Tensor] = {}
        for name, value in first.values.items():
            values[name] = torch.zeros_like(value)
            for weight, part in used:
                values[name] += weight * part[site].values[name]
        counts = {k: sum(w * p[site].counts[k] for w, p in used) for k in first.counts}
        joined[site] = ChannelStats(site, values, counts, first.reductions)
    return joined


def stability(
    model: nn.Module,
    calibrations: Mapping[str, Sequence[Mapping[FFNSite, ChannelStats]]],
    metrics: Params,
    *,
    replicates: int = 200,
    seed: int = 0,
) -> list[Stability]:
    """Compare every pair of calibrations under every metric.

    Args:
        model: gives the weights.
        calibrations: label -> statistics per document (see `per_document`).
        metrics: metric -> parameters.
        replicates: bootstrap draws; 0 leaves the intervals out.
        seed: of the draws.
    """
    if len(calibrations) < 2:
        raise UsageError("stability needs at least two calibrations: other seeds, or other texts.")
    rows: list[Stability] = []
    for name, params in metrics.items():
        if METRICS.get(name).inputs:
            raise UsageError(f"{name!r} needs more than statistics and weights; its stability is not available.")
        draws = {
            label: _scores(model, parts, name, params, replicates, seed + i)
            for i, (label, parts) in enumerate(calibrations.items())
        }
        for a, b in combinations(calibrations, 2):
            found = [agreement(x, y) for x, y in zip(draws[a], draws[b], strict=True)]
            sizes = (len(calibrations[a]), len(calibrations[b]))
            rank = _interval([f.spearman for f in found[1:]])
            top = _interval([f.jaccard for f in found[1:]])
            rows.append(Stability(name, a, b, found[0], rank, top, sizes))
    return rows


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


def _scores(
    model: nn.Module,
    parts: Sequence[Mapping[FFNSite, ChannelStats]],
    metric: str,
    params: Mapping[str, Any],
    replicates: int,
    seed: int,
) -> list[Scores]:
    """Scores of the whole calibration, then of each bootstrap replicate."""
    random = torch.Generator().manual_seed(seed)
    weights = [[1] * len(parts)]
    for _ in range(replicates):
        drawn = torch.randint(len(parts), (len(parts),), generator=random)
        weights.append(torch.bincount(drawn, minlength=len(parts)).tolist())
    return [score(model, combined(parts, w), metric, **params) for w in weights]


def _interval(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Percentile interval of the replicates; None without any."""
    known = torch.tensor([v for v in values if v is not None], dtype=torch.float64)
    if not len(known):
        return None
    low, high = torch.quantile(known, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)).tolist()
    return low, high
