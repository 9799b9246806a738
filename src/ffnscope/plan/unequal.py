"""Allocators that give sites different widths: by outliers, by standard scores, half-way, or by measured curves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.plan.allocate import fit_widths, global_, local, target_of
from ffnscope.plan.curves import Curves
from ffnscope.plan.floors import least_widths
from ffnscope.registry import allocator
from ffnscope.types import Budget, FFNSite, Scores

OUTLIER = 5.0
SPREAD = 0.08
LEVELS = 96
_WORK = 30_000


@allocator("halfway")
def halfway(scores: Scores, budget: Budget) -> dict[FFNSite, int]:
    """Half-way between ``local`` and ``global``.

    One ranking over all sites trusts that single scores add up far from the dense model, which they do not at high
    sparsity: half of the way is better than either end there. Needs scores whose units agree across sites, as
    ``global`` does.
    """
    even, free = local(scores, budget), global_(scores, budget)
    return fit_widths({s: (even[s] + free[s]) / 2 for s in scores.values}, target_of(scores, budget), budget)


@allocator("standardised")
def standardised(scores: Scores, budget: Budget) -> dict[FFNSite, int]:
    """One ranking over all sites of scores that are standardised in each: (score - mean) / standard deviation.

    FLAP's rule (arXiv:2312.11983), made for scores whose units differ across sites. Equal scores all become 0.
    """
    values: dict[FFNSite, Tensor] = {}
    for site, value in scores.values.items():
        centred = value.double() - value.double().mean()
        size = centred.square().mean().sqrt()
        values[site] = centred / size if float(size) > 0 else torch.zeros_like(centred)
    return global_(Scores(scores.metric, values, scores.facts), budget)


@allocator("outliers")
def outliers(scores: Scores, budget: Budget) -> dict[FFNSite, int]:
    """Sites with more outliers keep more: up to 0.08 of their channels more or less than the average.

    OWL (arXiv:2310.05175) with its M = 5 and lambda = 0.08, on channels: an outlier is a score above 5 times the mean
    of its site. The paper counts single weights. The share of a site is scaled linearly over all sites.
    """
    share = {s: float((v.double() > OUTLIER * v.double().mean()).double().mean()) for s, v in scores.values.items()}
    low, high = min(share.values()), max(share.values())
    if low == high:
        return local(scores, budget)
    lift = {s: 2 * SPREAD * (d - low) / (high - low) for s, d in share.items()}
    mean = sum(lift[s] * s.d_ff for s in lift) / sum(s.d_ff for s in lift)
    wished = {s: s.d_ff * (1 - budget.sparsity + lift[s] - mean) for s in lift}
    return fit_widths(wished, target_of(scores, budget), budget) if budget.sparsity else local(scores, budget)


@allocator("measured")
def measured(scores: Scores, budget: Budget, *, curves: Curves) -> dict[FFNSite, int]:
    """Least total rise of the measured loss curves, by dynamic programming.

    Exact on a grid of up to 96 widths per site (fewer where there are many sites); what the grid leaves of the budget
    goes step by step to the site whose curve falls most. That the rises of sites add up is the assumption; measure
    again around the solution to correct it. No site becomes narrower than its curve was measured, unless the budget
    leaves no other way: what lies beyond is a guess, and curves that flatten would empty some sites by it.
    """
    sites = list(scores.values)
    missing = [s.name for s in sites if s not in curves.points]
    if missing:
        raise UsageError(f"the curves have no {missing[0]}; measure them for the sites of the scores.")
    target = target_of(scores, budget)
    if budget.sparsity == 0:
        return local(scores, budget)
    step = budget.multiple_of
    levels = max(4, min(LEVELS, _WORK // len(sites)))
    grid = step * -(-max(s.d_ff for s in sites) // (levels * step))
    low = _within_reach(least_widths(sites, budget, target), curves, target, step)
    bounds = {s: (low[s], s.d_ff // step * step) for s in sites}
    choices = {s: _choices(bounds[s], grid) for s in sites}
    picked = _cheapest([curves.at(s, choices[s]) for s in sites], [choices[s] for s in sites], grid, target)
    return _settle(dict(zip(sites, picked, strict=True)), curves, target, bounds, step)


def _within_reach(low: dict[FFNSite, int], curves: Curves, target: int, step: int) -> dict[FFNSite, int]:
    """Lower bounds raised to the narrowest measured widths, where that leaves room for the target."""
    known = {s: -(-int(curves.points[s][0][0]) // step) * step for s in low}
    raised = {s: min(max(low[s], known[s]), s.d_ff // step * step) for s in low}
    return raised if sum(raised.values()) <= target else low


def _choices(bounds: tuple[int, int], grid: int) -> Tensor:
    """Allowed widths of a site, [n] int64: the least, the greatest, and the multiples of ``grid`` between."""
    low, high = bounds
    between = range(-(-low // grid) * grid, high + 1, grid)
    return torch.tensor(sorted({low, high, *(w for w in between if low <= w <= high)}))


def _cheapest(costs: list[Tensor], widths: list[Tensor], grid: int, target: int) -> list[int]:
    """Widths of the least total cost among those whose total, in units of the grid, is the target."""
    units = [torch.round(w / grid).long() for w in widths]
    room = max(round(target / grid), sum(int(u[0]) for u in units))
    room = min(room, sum(int(u[-1]) for u in units))
    best = torch.full((room + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0
    chosen = torch.zeros(len(units), room + 1, dtype=torch.int16)
    for i, (cost, unit) in enumerate(zip(costs, units, strict=True)):
        total = torch.full_like(best, torch.inf)
        for k, (c, u) in enumerate(zip(cost.tolist(), unit.tolist(), strict=True)):
            if u > room:
                break
            tried = best[: room + 1 - u] + c
            better = tried < total[u:]
            total[u:][better] = tried[better]
            chosen[i, u:][better] = k
        best = total
    found: list[int] = []
    for i in range(len(units) - 1, -1, -1):
        k = int(chosen[i, room])
        room -= int(units[i][k])
        found.append(int(widths[i][k]))
    return found[::-1]


def _settle(
    widths: dict[FFNSite, int], curves: Curves, target: int, bounds: Mapping[FFNSite, tuple[int, int]], step: int
) -> dict[FFNSite, int]:
    """Move single steps, where the curves say that it costs least or helps most, until the total is the target."""
    while 2 * abs(missing := target - sum(widths.values())) > step:
        move = step if missing > 0 else -step
        room = [s for s, w in widths.items() if bounds[s][0] <= w + move <= bounds[s][1]]
        if not room:
            break
        best = min(room, key=lambda s: _change(curves, s, widths[s], move))
        widths[best] += move
    return widths


def _change(curves: Curves, site: FFNSite, width: int, move: int) -> float:
    before, after = curves.at(site, torch.tensor([width, width + move])).tolist()
    return after - before
