"""Allocators: how many channels every site keeps. Which ones is shared by all (see `build_plan`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

import torch

from ffnscope.errors import UsageError
from ffnscope.plan.floors import check_names, floor_of, least_widths
from ffnscope.registry import ALLOCATORS, allocator
from ffnscope.types import Budget, FFNSite, Scores


def kept_count(d_ff: int, sparsity: float) -> int:
    """Channels to keep of ``d_ff``: the exact product rounded to the nearest integer, halves kept.

    The sparsity is taken as the decimal number that it prints as, so 0.3 of 10 removes exactly 3.
    """
    removed = Fraction(str(sparsity)) * d_ff
    whole, half = divmod(removed, 1)
    return d_ff - int(whole) - (1 if half > Fraction(1, 2) else 0)


def round_width(width: float, d_ff: int, budget: Budget) -> int:
    """Nearest allowed width: a multiple of ``multiple_of`` (halves up), within [min_width, d_ff].

    Raises:
        UsageError: no allowed width exists, for example a multiple above d_ff.
    """
    step = budget.multiple_of
    low = -(-budget.min_width // step) * step
    high = d_ff // step * step
    if low > d_ff or high < step:
        raise UsageError(
            f"no width of at least {budget.min_width} that is a multiple of {step} fits into {d_ff} channels; "
            "lower min_width or multiple_of."
        )
    return min(max(math.floor(width / step + 0.5) * step, low), high)


def check_budget(sites: Iterable[FFNSite], budget: Budget, allocator: str | None = None) -> None:
    """Raise UsageError when multiples and floors leave no room for the sparsity, or floors are for no site.

    A sparsity that an allocator of ours cannot reach with any scores is refused too: it divides made-up ones.
    """
    known = list(sites)
    check_names(known, budget)
    if not (budget.sparsity and known):
        return
    _ = least_widths(known, budget, kept_count(sum(s.d_ff for s in known), budget.sparsity))
    rule = None if allocator is None else ALLOCATORS.get(allocator)
    if rule is not None and rule.fn.__module__.startswith("ffnscope.") and not rule.needs_curves:
        rule.fn(Scores("trial", {site: torch.arange(1.0, site.d_ff + 1) for site in known}), budget)


@allocator("local")
def local(scores: Scores, budget: Budget) -> dict[FFNSite, int]:
    """The same sparsity in every site; where floors forbid that, the others lose the more."""
    even = {s: kept_count(s.d_ff, budget.sparsity) for s in scores.values}
    target = target_of(scores, budget)
    low = least_widths(even, budget, target)
    if all(floor_of(s, budget) <= max(1, width) for s, width in even.items()):
        return {s: max(low[s], round_width(width, s.d_ff, budget)) for s, width in even.items()}
    return fit_widths(even, target, budget)


@allocator("global")
def global_(scores: Scores, budget: Budget) -> dict[FFNSite, int]:
    """One ranking over all sites: the highest scores stay, wherever they are.

    Meaningful only for scores whose units agree across sites (loss units do, weight norms usually do not). Sites keep
    at least their floors. With ``multiple_of`` the total is met as nearly as multiples allow.
    """
    sites = list(scores.values)
    target = target_of(scores, budget)
    floors = least_widths(sites, budget, target)
    if 2 * (sum(floors.values()) - target) > budget.multiple_of:
        raise UsageError(
            f"the floors and multiple_of {budget.multiple_of} need {sum(floors.values())} channels in {len(sites)} "
            f"sites; a sparsity of {budget.sparsity:g} leaves {target}. Lower one of them."
        )
    values = torch.cat([scores.values[s].double() for s in sites])
    lifted = torch.cat([_floor_first(scores.values[s].double(), floors[s]) for s in sites])
    order = torch.sort(values, descending=True, stable=True).indices
    order = order[torch.sort(lifted[order].int(), descending=True, stable=True).indices]
    owner = torch.repeat_interleave(torch.arange(len(sites)), torch.tensor([s.d_ff for s in sites]))
    counts = torch.bincount(owner[order[:target]], minlength=len(sites)).tolist()
    widths = dict(zip(sites, counts, strict=True))
    return widths if budget.multiple_of == 1 else fit_widths(widths, target, budget)


def _floor_first(values: torch.Tensor, floor: int) -> torch.Tensor:
    """Mark the ``floor`` best channels of a site, which stay whatever the global ranking says."""
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[torch.sort(values, descending=True, stable=True).indices[:floor]] = True
    return mask


def target_of(scores: Scores, budget: Budget) -> int:
    """Channels of all sites to keep."""
    return kept_count(sum(s.d_ff for s in scores.values), budget.sparsity)


def fit_widths(widths: Mapping[FFNSite, float], target: int, budget: Budget) -> dict[FFNSite, int]:
    """Round wished widths, then move single steps, least rounding error first, until the total is nearest to target.

    Where floors hold some sites above their wishes, the wishes of the others shrink in proportion first.

    Raises:
        UsageError: the floors leave no room for the target.
    """
    step = budget.multiple_of
    low = least_widths(widths, budget, target)
    high = {s: s.d_ff // step * step for s in widths}
    widths = _shrunk(widths, low, target, step)
    rounded = {s: min(max(math.floor(w / step + 0.5) * step, low[s]), high[s]) for s, w in widths.items()}
    while True:
        missing = target - sum(rounded.values())
        sign = 1 if missing > 0 else -1
        if 2 * abs(missing) <= step:
            return rounded
        room = [s for s in rounded if low[s] <= rounded[s] + sign * step <= high[s]]
        if not room:
            return rounded
        first_gains = room if sign > 0 else room[::-1]  # equal errors: the earlier site keeps more
        best = max(first_gains, key=lambda s: sign * (widths[s] - rounded[s]))
        rounded[best] += sign * step


def _shrunk(
    widths: Mapping[FFNSite, float], low: Mapping[FFNSite, int], target: int, step: int
) -> Mapping[FFNSite, float]:
    """Wishes times the factor with which they, or the floors above them, come to the target."""

    def total(factor: float) -> float:
        return sum(max(low[s], factor * w) for s, w in widths.items())

    if total(1.0) - target <= len(widths) * step / 2:  # no more than rounding
        return widths
    below, above = 0.0, 1.0
    for _ in range(60):
        middle = (below + above) / 2
        below, above = (below, middle) if total(middle) > target else (middle, above)
    return {s: above * w for s, w in widths.items()}
