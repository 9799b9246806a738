"""What the commands score, rank and prune compute: one calibration, or several that are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ffnscope.analyze.levels import calibrate_all
from ffnscope.analyze.question import Question
from ffnscope.analyze.repeat_passes import repeat_bytes, repeat_passes
from ffnscope.analyze.repeats import Repeat, repeat_scores
from ffnscope.analyze.stability import Stability, stability
from ffnscope.calibrate.collect import PassOptions
from ffnscope.calibrate.windows import Windows
from ffnscope.io import read_tensors
from ffnscope.run.progress import Reporter
from ffnscope.run.steps import ANNOUNCED_BYTES, discard_damaged
from ffnscope.scoring import naming_weights
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
    texts: Mapping[str, tuple[Question, Windows]],
    options: PassOptions,
    reporter: Reporter,
    folder: Path | None = None,
) -> list[Stability]:
    """Calibrate on every text apart and compare the rankings, with intervals over documents.

    Args:
        texts: label -> what to score, of equal metrics, and the windows.
        options: sizes of the passes.
        reporter: told what is done.
        folder: keeps what is done of each calibration, for the same call after an interrupt; the caller removes it.
    """
    found: dict[str, Repeat] = {}
    for i, (label, (asked, windows)) in enumerate(texts.items()):
        own = folder / f"repeat_{i}" if folder else None
        for path in own.glob("*.safetensors") if own else ():
            discard_damaged(reporter, path, read_tensors)
        if not i:
            _announce(reporter, asked)
        with reporter.task(f"calibrate {label}", "tokens") as update, naming_weights(asked.model):
            found[label] = repeat_scores(asked, windows, options=options, folder=own, on_batch=update)
    with reporter.task("compare rankings", "pairs") as update:
        return stability(found, update)


def _announce(reporter: Reporter, asked: Question) -> None:
    """Say how large the sums of a comparison are, where these are large."""
    passes = repeat_passes(asked.params, asked.rule)
    size = repeat_bytes(asked.sites, passes, asked.rule.size(asked.sites))
    if size > ANNOUNCED_BYTES:
        reporter.say(f"intervals over documents need {size / 2**20:,.0f} MiB of memory: all sums, and those of a part")
