"""Plans by measured loss curves: measured on the dense model, then again around the first solution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ffnscope.analyze.curves import CurveOptions, first_solution, measure_curves
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.plan.build import build_plan
from ffnscope.plan.curves import Curves
from ffnscope.types import Budget, ChannelStats, FFNSite, PruningPlan, Scores

Stats = Mapping[FFNSite, ChannelStats]
WINDOWS = 16
"""Of the calibration, on which curves are measured unless something else is said."""


@dataclass(frozen=True, slots=True)
class CurveRounds:
    """How often curves are measured, and on how much text.

    Attributes:
        rounds: 1 measures every FFN in the dense model; each further round measures around the solution before it.
        num_samples: windows of the calibration text, evenly spread over it.
        options: widths and batches.
        allocator: that reads the curves.
    """

    rounds: int = 2
    num_samples: int = WINDOWS
    options: CurveOptions = field(default_factory=CurveOptions)
    allocator: str = "measured"

    def __post_init__(self) -> None:
        for name in ("rounds", "num_samples"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} of measured curves must be at least 1; got {getattr(self, name)}.")

    def windows(self, calibration: Windows) -> Windows:
        """The part of a calibration text to measure on; all of one that has no more."""
        return spread(calibration, self.num_samples)


def spread(windows: Windows, n: int) -> Windows:
    """``n`` windows, evenly spread over a text; all where there are no more."""
    if n >= len(windows):
        return windows
    return windows[torch.arange(n) * len(windows) // n]


def without_unreached(scores: Scores) -> Scores:
    """Scores without experts that no token reached: they stay whole, so that no curve of them is needed."""
    unreached = scores.facts.get("unreached", ())
    return Scores(scores.metric, {s: v for s, v in scores.values.items() if s.name not in unreached}, scores.facts)


def measure_round(
    model: nn.Module,
    scores: Scores,
    stats: Stats | None,
    windows: Windows,
    plan: PruningPlan | None,
    *,
    options: CurveOptions,
    on_cut: Callable[[int, int], None] | None = None,
) -> Curves:
    """`measure_curves` of the FFNs that some token reached: in the dense model, or around a plan (`first_solution`)."""
    around = None if plan is None else first_solution(model, plan, stats)
    reached = without_unreached(scores)
    return measure_curves(model, reached, stats, windows, around=around, options=options, on_cut=on_cut)


def solve_in_rounds(
    measure: Callable[[int, PruningPlan | None], Curves], make: Callable[[Curves], PruningPlan], rounds: int
) -> tuple[PruningPlan, list[Curves]]:
    """Measure and plan in turn; returns the last plan, and the curves of all rounds.

    Args:
        measure: curves of a round, 1 or higher, around a plan (see `first_solution`), or in the first round None.
        make: the plan that some curves give.
        rounds: how often.
    """
    found = [measure(1, None)]
    plan = make(found[0])
    for number in range(2, rounds + 1):
        found.append(measure(number, plan))
        plan = make(found[-1])
    return plan, found


def plan_by_curves(
    model: nn.Module,
    scores: Scores,
    stats: Stats | None,
    windows: Windows,
    budget: Budget | float,
    *,
    rounds: CurveRounds | None = None,
    on_cut: Callable[[int, int], None] | None = None,
) -> tuple[PruningPlan, list[Curves]]:
    """Plan by measured loss curves: curves of the dense model first, then around the solution.

    Args:
        model: dense; left as it was.
        scores: the order of removal in each FFN.
        stats: with ``h_outer``: cuts are refitted in one shot; None leaves the columns.
        windows: text to measure on, as it is.
        budget: how much to remove; a number is a sparsity.
        rounds: how often, and the widths.
        on_cut: called with (cuts measured, cuts in all) of the round.

    Raises:
        UsageError, NonFiniteError, DeviceError, ArtifactError: see `measure_curves` and `build_plan`.
    """
    asked = rounds or CurveRounds()

    def measure(number: int, plan: PruningPlan | None) -> Curves:
        options = replace(asked.options, checkpoint=_numbered(asked.options.checkpoint, number))
        return measure_round(model, scores, stats, windows, plan, options=options, on_cut=on_cut)

    make = partial(build_plan, scores, budget, asked.allocator)
    return solve_in_rounds(measure, lambda curves: make(curves=curves), asked.rounds)


def _numbered(path: Path | None, number: int) -> Path | None:
    return path if path is None or number == 1 else path.with_name(f"{path.stem}_{number}{path.suffix}")


def curve_cuts(sites: Sequence[FFNSite], rounds: CurveRounds) -> int:
    """Cuts to measure per window, over all rounds; each runs half of the blocks on average."""
    further = (rounds.rounds - 1) * 4  # three widths, and the FFN whole
    return len(sites) * (len(rounds.options.shares) + further)
