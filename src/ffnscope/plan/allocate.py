"""Allocators: how many channels every site keeps. Which ones is shared by all (see `build_plan`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch

from ffnscope.errors import UsageError
from ffnscope.registry import allocator
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


@allocator("local")
def local(scores: Scores, budget: Budget) -> dict[FFNSite, int]:
    """The same sparsity in every site."""
    return {s: round_width(kept_count(s.d_ff, budget.sparsity), s.d_ff, budget) for s in scores.values}


@allocator("global")
def global_(scores: Scores, budget: Budget) -> dict[FFNSite, int]:
    """One ranking over all sites: the highest scores stay, wherever they are.

    Meaningful only for scores whose units agree across sites (loss units do, weight norms usually do not). Sites have
    at least ``min_width`` channels. With ``multiple_of`` the total is met as nearly as multiples allow.
    """
    sites = list(scores.values)
    target = kept_count(sum(s.d_ff for s in sites), budget.sparsity)
    floors = {s: round_width(1, s.d_ff, budget) for s in sites}
    if 2 * (sum(floors.values()) - target) > budget.multiple_of:
        raise UsageError(
            f"min_width {budget.min_width} and multiple_of {budget.multiple_of} need {sum(floors.values())} channels "
            f"in {len(sites)} sites; a sparsity of {budget.sparsity:g} leaves {target}. Lower one of them."
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


def fit_widths(widths: Mapping[FFNSite, float], target: int, budget: Budget) -> dict[FFNSite, int]:
    """Round wished widths, then move single steps, least rounding error first, until the total is nearest to target."""
    step = budget.multiple_of
    rounded = {s: round_width(w, s.d_ff, budget) for s, w in widths.items()}
    low = {s: round_width(1, s.d_ff, budget) for s in widths}
    high = {s: round_width(s.d_ff, s.d_ff, budget) for s in widths}
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
