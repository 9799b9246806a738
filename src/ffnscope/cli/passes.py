"""What the commands score, rank and prune compute: one calibration, or several that are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ffnscope.analyze.levels import calibrate_all
from ffnscope.analyze.question import Question
from ffnscope.analyze.repeats import Repeat, repeat_scores
from ffnscope.analyze.stability import Stability, stability
from ffnscope.calibrate.collect import PassOptions
from ffnscope.calibrate.windows import Windows
from ffnscope.run.progress import Reporter
from ffnscope.types import ChannelStats, FFNSite, Scores

Update = Callable[[int, int], None]


def calibrate_and_score(
    asked: Question, windows: Windows, options: PassOptions, update: Update, facts: Mapping[str, Any] | None = None
) -> tuple[dict[FFNSite, ChannelStats], dict[str, Scores]]:
    """Calibrate for all metrics (once, or twice when one needs the core) and score."""
    stats, core = calibrate_all(
        asked.model, windows, asked.params, sites=asked.sites, options=options, rule=asked.rule, on_batch=update
    )
    return stats, asked.scores(stats, core, facts)


def compare_calibrations(
    asked: Question,
    texts: Mapping[str, Windows],
    options: PassOptions,
    reporter: Reporter,
    folder: Path | None = None,
) -> list[Stability]:
    """Calibrate on every text apart and compare the rankings, with intervals by document.

    ``folder`` keeps what is done of each repeat, for the same call after an interrupt; the caller removes it.
    """
    found: dict[str, Repeat] = {}
    for i, (label, windows) in enumerate(texts.items()):
        own = folder / f"repeat_{i}" if folder else None
        with reporter.task(f"calibrate {label}", "tokens") as update:
            found[label] = repeat_scores(asked, windows, options=options, folder=own, on_batch=update)
    with reporter.task("compare rankings", "pairs") as update:
        return stability(found, update)
