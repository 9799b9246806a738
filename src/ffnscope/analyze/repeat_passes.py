"""What the calibration of a repeat takes: how its intervals are made, in which passes, and in how much memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ffnscope.analyze.group_sums import is_large
from ffnscope.analyze.jackknife import GROUPS
from ffnscope.analyze.levels import CoreRule, first_level
from ffnscope.calibrate.collect import required_statistics
from ffnscope.calibrate.memory import statistics_bytes
from ffnscope.registry import METRICS, STATISTICS
from ffnscope.types import FFNSite

Params = Mapping[str, Mapping[str, Any]]
Method = Literal["jackknife", "jackknife, fixed core", "no text", "one document", "maximum"]
"""How an interval was made: by the jackknife; by the jackknife with the core of the whole text in all groups; not at
all, because the metric reads no text, a text is one document, or a matrix of maxima cannot be taken back."""


@dataclass(frozen=True, slots=True)
class RepeatPasses:
    """Statistics of the passes over the text that one repeat makes.

    Attributes:
        first: what needs no core.
        core: what needs the supernode core, which comes from the first pass.
        again: what is larger than a vector per site, once more group by group.
    """

    first: list[str]
    core: list[str]
    again: list[str]

    def named(self) -> dict[str, list[str]]:
        """The passes that are made, in order: what each is for -> its statistics."""
        names = {"calibrate": self.first, "calibrate core": self.core, "leave groups out": self.again}
        return {what: statistics for what, statistics in names.items() if statistics}


def repeat_passes(metrics: Params, rule: CoreRule, n_groups: int = GROUPS) -> RepeatPasses:
    """Return which statistics a repeat takes in which pass, for a text of ``n_groups`` groups of documents."""
    methods = interval_methods(metrics, rule, n_groups)
    sampled = {m: p for m, p in metrics.items() if is_jackknifed(methods[m])}
    return RepeatPasses(
        required_statistics(first_level(metrics, rule), core=False),
        required_statistics(metrics, core=True),
        [name for name in required_statistics(sampled) if is_large(name)],
    )


def repeat_bytes(sites: Sequence[FFNSite], passes: RepeatPasses, core_size: int, n_groups: int = GROUPS) -> int:
    """Memory of the sums of a repeat, in bytes: vectors per group, larger statistics in total and of one group.

    ``core_size`` is the number of core channels per site. Those of all groups together are taken as twice as many.
    """
    core_size *= 2
    kept = [name for name in (*passes.first, *passes.core) if not is_large(name)]
    vectors = statistics_bytes(sites, kept, core_size)
    first, core, again = (
        statistics_bytes(sites, [name for name in names if is_large(name)], core_size)
        for names in (passes.first, passes.core, passes.again)
    )
    in_first, later = 2 * first, first + core + max(core, again)
    return n_groups * vectors + max(in_first, later)


def interval_methods(metrics: Params, rule: CoreRule, n_groups: int = GROUPS) -> dict[str, Method]:
    """Return how the intervals of each metric are made for a text of ``n_groups`` groups of documents."""
    return {m: _method(m, p, n_groups, fixed_core=not finds_cores(metrics, rule)) for m, p in metrics.items()}


def finds_cores(metrics: Params, rule: CoreRule) -> bool:
    """Whether the core of the text without a group is known before the core pass, and statistics can follow it.

    The metric that defines the core must need vectors only, which are kept per group; and each statistic that reads the
    core must have an axis of core channels, from which those of any one core can be picked.
    """
    defines = METRICS.get(rule.metric).needed(rule.params)
    reads = required_statistics(metrics, core=True)
    return not any(map(is_large, defines)) and all("core" in STATISTICS.get(name).shape for name in reads)


def is_jackknifed(method: Method) -> bool:
    """Whether scores without each group are needed."""
    return method.startswith("jackknife")


def _method(metric: str, params: Mapping[str, Any], n_groups: int, *, fixed_core: bool) -> Method:
    rule = METRICS.get(metric)
    needed = [STATISTICS.get(name) for name in rule.needed(params)]
    if not needed and "core" not in rule.inputs:
        return "no text"
    if n_groups < 2:
        return "one document"
    if any(one.reduce == "max" and is_large(one.name) for one in needed):
        return "maximum"
    return "jackknife, fixed core" if fixed_core and "core" in rule.inputs else "jackknife"
