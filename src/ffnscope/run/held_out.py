"""What is told of the held-out windows that choose the damping of one-shot reconstructions."""

from __future__ import annotations

from collections.abc import Sequence

from ffnscope.apply.held_out import held_out_windows
from ffnscope.apply.refit import DAMPING
from ffnscope.calibrate.memory import statistics_bytes
from ffnscope.calibrate.windows import Windows
from ffnscope.types import FFNSite


def held_out_told(sites: Sequence[FFNSite], calibration: Windows) -> tuple[str, int]:
    """The pass over these windows in words, and its tokens; 0 of a text of less than 8 windows, which has no pass."""
    tokens = held_out_windows(calibration).n_tokens
    size = statistics_bytes(sites, ["h_outer"]) / 2**20
    what = f"1 pass: {tokens:,} tokens forward, for the damping of one-shot refits; {size:,.0f} MiB more for sums"
    return what, tokens


def held_out_bytes(sites: Sequence[FFNSite], calibration: Windows) -> int:
    """Most that their sums take beside those of the whole text: twice while they are written."""
    return 2 * statistics_bytes(sites, ["h_outer"]) if len(held_out_windows(calibration)) else 0


def damping_told(given: float | None, calibration: Windows | None) -> str:
    """What the damping of a one-shot reconstruction is; without a text there are no sums that choose it."""
    if given is None and calibration is not None and len(held_out_windows(calibration)):
        return "damping chosen on held-out windows"
    return f"damping {DAMPING if given is None else given:g}"
