"""The statistics of a text as sums over groups of its documents, from which any one group can be left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import reduce

import torch
from torch import Tensor

from ffnscope.calibrate.collect import join_statistics
from ffnscope.registry import STATISTICS
from ffnscope.types import ChannelStats, FFNSite

Stats = dict[FFNSite, ChannelStats]


def is_large(statistic: str) -> bool:
    """Whether a statistic is more than one vector per site: too large to keep once per group."""
    return len(STATISTICS.get(statistic).shape) > 1


def only(stats: Mapping[FFNSite, ChannelStats], names: Collection[str]) -> Stats:
    """Restrict statistics to ``names``; what was not collected is left out."""
    found: Stats = {}
    for site, part in stats.items():
        chosen = [name for name in part.values if name in names]
        found[site] = ChannelStats(
            site,
            {name: part.values[name] for name in chosen},
            {name: part.counts[name] for name in chosen},
            {name: part.reductions[name] for name in chosen},
        )
    return found


def with_core(stats: Stats, union: Mapping[FFNSite, Tensor], core: Mapping[FFNSite, Tensor]) -> Stats:
    """Pick the entries of one core from statistics that were taken for the ``union`` of several.

    Args:
        stats: statistics whose shapes may have axes of core channels.
        union: site -> sorted indices of the channels that they were taken for; empty where no core is read.
        core: site -> some of these.
    """
    found = dict(stats)
    for site, channels in union.items():
        place = torch.searchsorted(channels, core[site])
        values: dict[str, Tensor] = {}
        for name, value in stats[site].values.items():
            axes = [axis for axis, size in enumerate(STATISTICS.get(name).shape) if size == "core"]
            values[name] = reduce(lambda v, axis: v.index_select(axis, place), axes, value)
        found[site] = ChannelStats(site, values, stats[site].counts, stats[site].reductions)
    return found


class GroupSums:
    """Sums over groups: vectors are kept per group, larger statistics in total only.

    Attributes:
        groups: vectors of each group so far.
        total: larger statistics of all groups so far; None before the first.
    """

    def __init__(self, groups: list[Stats] | None = None, total: Stats | None = None):
        self.groups = groups or []
        self.total = total

    def add(self, part: Stats) -> None:
        """Add the statistics of the next group; its tensors are taken over, and may change later."""
        names = {name for stats in part.values() for name in stats.values}
        large = {name for name in names if is_large(name)}
        self.groups.append(only(part, names - large))
        if self.total is None:
            self.total = only(part, large)
            return
        for site, stats in only(part, large).items():
            total = self.total[site]
            for name, value in stats.values.items():
                join = torch.add if total.reductions[name] == "sum" else torch.maximum
                join(total.values[name], value, out=total.values[name])
            counts = {name: n + stats.counts[name] for name, n in total.counts.items()}
            self.total[site] = ChannelStats(site, total.values, counts, total.reductions)

    def whole(self) -> Stats:
        """Statistics of all groups."""
        assert self.total is not None, "no group was added"
        return join_statistics(_merged(self.groups), self.total)

    def without(self, index: int, large: Stats) -> Stats:
        """Statistics of all groups but one.

        Args:
            index: the group.
            large: larger statistics of that group, which are subtracted from the total. Their memory is used for the
                result. Those that are not given are not in the result, and neither is a maximum, which cannot be taken
                back.
        """
        assert self.total is not None, "no group was added"
        others = [group for i, group in enumerate(self.groups) if i != index]
        rest: Stats = {}
        for site, part in large.items():
            total = self.total[site]
            names = [name for name, how in part.reductions.items() if how == "sum" and name in total.values]
            values = {n: torch.sub(total.values[n], part.values[n], out=part.values[n]) for n in names}
            counts = {n: total.counts[n] - part.counts[n] for n in names}
            rest[site] = ChannelStats(site, values, counts, dict.fromkeys(names, "sum"))
        return join_statistics(_merged(others), rest)


def _merged(parts: list[Stats]) -> Stats:
    return {site: reduce(ChannelStats.merge, (part[site] for part in parts)) for site in parts[0]}
