"""The least width of every site: what a `Budget` says of it, and what is protected in it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction

from ffnscope.errors import UsageError
from ffnscope.types import Budget, FFNSite


@dataclass(frozen=True, slots=True)
class SiteFloors(Mapping[str, float]):
    """Floors of single sites beside those of a budget, in the place of its ``min_keep``.

    Attributes:
        counts: name of a site -> channels.
        beside: the ``min_keep`` that holds as well.
    """

    counts: Mapping[str, int]
    beside: float | Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        return self.counts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)


def with_floors(budget: Budget, counts: Mapping[FFNSite, int]) -> Budget:
    """The same budget, in which these sites also keep at least so many channels."""
    return replace(budget, min_keep=SiteFloors({s.name: n for s, n in counts.items()}, budget.min_keep))


def floor_of(site: FFNSite, budget: Budget) -> int:
    """Channels that a site keeps at least, at least 1; a share is rounded up.

    Raises:
        UsageError: more channels than the site has.
    """
    given, own = budget.min_keep, 1
    if isinstance(given, SiteFloors):  # looked up, since there may be thousands of experts
        given, own = given.beside, given.counts.get(site.name, 1)
    asked = given if isinstance(given, Mapping) else {"*": given}
    floors = [_count(floor, site.d_ff) for name, floor in asked.items() if fnmatchcase(site.name, name)]
    found = max(own, budget.min_width, *floors)
    if floors and max(floors) > site.d_ff:
        raise UsageError(
            f"min_keep asks for {max(floors)} channels of {site.name}, which has {site.d_ff}. Lower it, or give a "
            "share in [0, 1]."
        )
    return found


def least_width(site: FFNSite, budget: Budget) -> int:
    """The floor of a site, rounded up to a multiple of ``multiple_of``.

    Raises:
        UsageError: no such width fits into the site.
    """
    step, floor = budget.multiple_of, floor_of(site, budget)
    low = -(-floor // step) * step
    if low > site.d_ff:
        raise UsageError(
            f"no width of at least {floor} that is a multiple of {step} fits into {site.d_ff} channels; "
            "lower min_width, min_keep or multiple_of."
        )
    return low


def least_widths(sites: Iterable[FFNSite], budget: Budget, target: int) -> dict[FFNSite, int]:
    """`least_width` of every site, where the floors leave room for ``target`` channels in all.

    Raises:
        UsageError: the floors alone are more than the target, so the sparsity cannot be reached.
    """
    found = {site: least_width(site, budget) for site in sites}
    floors = {site: floor_of(site, budget) for site in found}
    total = sum(floors.values())
    if total > max(target, len(floors)):
        most = max(floors, key=lambda site: floors[site])
        raise UsageError(
            f"the floors (min_width {budget.min_width}, min_keep) keep {total} channels of {len(floors)} FFNs, the "
            f"most in {most.name} ({floors[most]}); a sparsity of {budget.sparsity:g} leaves {target}. Lower one of "
            "them."
        )
    return found


def check_names(sites: Iterable[FFNSite], budget: Budget) -> None:
    """Raise UsageError when a name of ``min_keep`` matches no site."""
    if not isinstance(budget.min_keep, Mapping):
        return
    names = [site.name for site in sites]
    for name in budget.min_keep:
        if not any(fnmatchcase(known, name) for known in names):
            near = difflib.get_close_matches(name, names, n=1) or names[:1]
            raise UsageError(
                f"min_keep names {name!r}, which is no FFN of these scores. Did you mean {near[0]!r}? Patterns such as "
                "'model.layers.[0-3].mlp' work too."
            )


def _count(floor: float, d_ff: int) -> int:
    """Channels of a floor that is a share or a number; the share is the decimal number that it prints as."""
    return math.ceil(Fraction(str(floor)) * d_ff) if floor <= 1 else int(floor)
