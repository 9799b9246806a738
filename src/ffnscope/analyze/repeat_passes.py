"""What the calibration of a repeat takes: how its intervals are made, in which passes, and in how much memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ffnscope.analyze.group_sums import is_large
from ffnscope.analyze.jackknife import GROUPS
from ffnscope.analyze.levels import CoreRule, first_level
from ffnscope.calibrate.collect import required_statistics, statistics_bytes
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
    sampled = {m: p for m, p in metrics.items() if is_jackknifed(interval_method(m, p, n_groups))}
    return RepeatPasses(
        required_statistics(first_level(metrics, rule), core=False),
        required_statistics(metrics, core=True),
        [name for name in required_statistics(sampled) if is_large(name)],
    )


def repeat_bytes(sites: Sequence[FFNSite], passes: RepeatPasses, core_size: int, n_groups: int = GROUPS) -> int:
    """Memory of the sums of a repeat, in bytes: vectors per group, larger statistics in total and of one group.

    ``core_size`` is the number of core channels per site.
    """
    kept = [name for name in (*passes.first, *passes.core) if not is_large(name)]
    vectors = statistics_bytes(sites, kept, core_size)
    first, core, again = (
        statistics_bytes(sites, [name for name in names if is_large(name)], core_size)
        for names in (passes.first, passes.core, passes.again)
    )
    in_first, later = 2 * first, first + core + max(core, again)
    return n_groups * vectors + max(in_first, later)


def interval_method(metric: str, params: Mapping[str, Any], n_groups: int = GROUPS) -> Method:
    """Return how the intervals of a metric are made for a text of ``n_groups`` groups of documents."""
    rule = METRICS.get(metric)
    needed = [STATISTICS.get(name) for name in rule.needed(params)]
    if not needed and "core" not in rule.inputs:
        return "no text"
    if n_groups < 2:
        return "one document"
    if any(one.reduce == "max" and is_large(one.name) for one in needed):
        return "maximum"
    return "jackknife, fixed core" if "core" in rule.inputs else "jackknife"


def is_jackknifed(method: Method) -> bool:
    """Whether scores without each group are needed."""
    return method.startswith("jackknife")
