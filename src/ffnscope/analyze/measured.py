"""Plans by measured loss curves: measured on the dense model, then again around the first solution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffnscope.analyze.curves import CurveOptions, first_solution, measure_curves
from ffnscope.apply import method as methods
from ffnscope.apply.method import GRADIENT_WINDOWS, Method, named_method, reconstruct_plan
from ffnscope.apply.pruned import Pruned
from ffnscope.apply.sequential import SequentialOptions
from ffnscope.calibrate.collect import PassOptions, collect, required_statistics, weights_hash
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.plan.build import build_plan
from ffnscope.plan.curves import Curves
from ffnscope.scoring import score
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
    reached = without_unreached(scores)

    def measure(number: int, plan: PruningPlan | None) -> Curves:
        around = None if plan is None else first_solution(model, plan, stats)
        options = replace(asked.options, checkpoint=_numbered(asked.options.checkpoint, number))
        return measure_curves(model, reached, stats, windows, around=around, options=options, on_cut=on_cut)

    make = partial(build_plan, scores, budget, asked.allocator)
    return solve_in_rounds(measure, lambda curves: make(curves=curves), asked.rounds)


def _numbered(path: Path | None, number: int) -> Path | None:
    return path if path is None or number == 1 else path.with_name(f"{path.stem}_{number}{path.suffix}")


def plan_and_reconstruct(
    model: nn.Module,
    windows: Windows,
    budget: Budget | float,
    *,
    method: Method | str = "best",
    options: PassOptions | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> Pruned:
    """Calibrate, score, plan and reconstruct: everything but the cut, for which see `reconstruct_` and `prune_`.

    With an allocator that reads measured curves these are measured on 16 of the windows, evenly spread over the text,
    in two rounds (`CurveRounds`), and refitted where the method refits. Scores and least squares see these windows
    too; held out must be the text that the result is judged on. Call `plan_by_curves` for other numbers or other text.

    Arguments, result and errors are those of `ffnscope.apply.method.plan_and_reconstruct`, which this is otherwise.
    """
    method = named_method(method) if isinstance(method, str) else method
    if not method.measures:
        given: Any = {"method": method, "options": options, "on_batch": on_batch, "on_block": on_block}
        return methods.plan_and_reconstruct(model, windows, budget, **given)
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    method.check_budget(budget)
    options = options or PassOptions(gradient_windows=GRADIENT_WINDOWS)
    names = (*required_statistics([method.metric]), *method.statistics, *method.curve_statistics)
    stats = collect(model, windows, list(dict.fromkeys(names)), options=options, on_batch=on_batch)
    scores = score(model, stats, method.metric, facts={"model": weights_hash(model)})
    curves = CurveOptions(batch_size=options.batch_size, checkpoint=_beside(options, ".json"))
    measured = CurveRounds(options=curves, allocator=method.allocator)
    refit = stats if method.curve_statistics else None
    plan, _ = plan_by_curves(model, scores, refit, measured.windows(windows), budget, rounds=measured)
    sequential = SequentialOptions(batch_size=options.batch_size, checkpoint=_beside(options, ".blocks"))
    return reconstruct_plan(model, plan, method, windows=windows, stats=stats, options=sequential, on_block=on_block)


def _beside(options: PassOptions, suffix: str) -> Path | None:
    return None if options.checkpoint is None else options.checkpoint.with_suffix(suffix)


def curve_cuts(sites: Sequence[FFNSite], rounds: CurveRounds) -> int:
    """Cuts to measure per window, over all rounds; each runs half of the blocks on average."""
    further = (rounds.rounds - 1) * 4  # three widths, and the FFN whole
    return len(sites) * (len(rounds.options.shares) + further)
