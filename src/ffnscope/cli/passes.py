"""What the commands score, rank and prune compute: one calibration, or several that are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ffnscope.analyze.levels import CoreRule, calibrate_all
from ffnscope.analyze.stability import Stability, compare_scores, has_intervals, per_document, stability
from ffnscope.calibrate.collect import PassOptions
from ffnscope.calibrate.windows import Windows
from ffnscope.registry import METRICS
from ffnscope.run.progress import Reporter
from ffnscope.scoring import score
from ffnscope.types import ChannelStats, FFNSite, Scores

Update = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Question:
    """What is scored: the FFNs of a model by metrics with their parameters, and what some metrics need beyond text."""

    model: nn.Module
    sites: list[FFNSite]
    params: Mapping[str, Mapping[str, Any]]
    rule: CoreRule = field(default_factory=CoreRule)
    reference: nn.Module | None = None


def calibrate_and_score(
    asked: Question, windows: Windows, options: PassOptions, update: Update, facts: Mapping[str, Any] | None = None
) -> tuple[dict[FFNSite, ChannelStats], dict[str, Scores]]:
    """Calibrate for all metrics (once, or twice when one needs the core) and score."""
    stats, core = calibrate_all(
        asked.model, windows, asked.params, sites=asked.sites, options=options, rule=asked.rule, on_batch=update
    )
    given: dict[str, Any] = {"facts": facts, "core": core, "reference": asked.reference}
    return stats, {m: score(asked.model, stats, m, **given, **p) for m, p in asked.params.items()}


def compare_calibrations(
    asked: Question, texts: Mapping[str, Windows], options: PassOptions, reporter: Reporter
) -> list[Stability]:
    """Calibrate on every text apart and compare the rankings: with intervals by document where a metric allows that.

    The others (second moments, the supernode core, or no text at all) are compared by value.
    """
    resampled = {n: p for n, p in asked.params.items() if METRICS.get(n).needed(p) and has_intervals(n, p)}
    rest = Question(
        asked.model,
        asked.sites,
        {n: p for n, p in asked.params.items() if n not in resampled},
        asked.rule,
        asked.reference,
    )
    parts: dict[str, list[dict[FFNSite, ChannelStats]]] = {}
    tables: dict[str, dict[str, Scores]] = {}
    for label, windows in texts.items():
        if resampled:
            with reporter.task(f"calibrate {label}", "tokens") as update:
                parts[label] = per_document(asked.model, windows, resampled, asked.sites, options, update)
        if rest.params:
            with reporter.task(f"calibrate {label}: {', '.join(rest.params)}", "tokens") as update:
                _, tables[label] = calibrate_and_score(rest, windows, options, update)
    documents = {label: len(windows.document.unique()) for label, windows in texts.items()}
    rows = [row for n in rest.params for row in compare_scores({k: t[n] for k, t in tables.items()}, documents)]
    if resampled:
        with reporter.task("bootstrap over documents", "replicates"):
            rows += stability(asked.model, parts, resampled, reference=asked.reference)
    order = list(asked.params)
    return sorted(rows, key=lambda row: order.index(row.metric))
