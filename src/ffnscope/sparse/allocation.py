"""Densities of FFNs under one budget of bytes, from what each loses at each density."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.types import FFNSite


@dataclass(frozen=True, slots=True, eq=False)
class DamageCurve:
    """What one FFN costs and loses at some densities; the first point is dense.

    Attributes:
        bytes_read: per token [n], predictor included; of the dense FFN at the first.
        damage: [n], 0 at the first; measured with the order of the predictor, so that its mistakes are in it.
        density: [n], 1 at the first and falling.
    """

    bytes_read: Tensor
    damage: Tensor
    density: Tensor

    def __post_init__(self) -> None:
        n = len(self.density)
        if n < 1 or len(self.bytes_read) != n or len(self.damage) != n:
            raise UsageError("a damage curve needs one number of bytes, one damage and one density per point.")
        if not bool(self.damage.isfinite().all() & self.bytes_read.isfinite().all()):
            raise NonFiniteError("a damage is NaN or infinite; look for it in the traces.")


@dataclass(frozen=True, slots=True)
class Point:
    """Index of a point of a curve, its bytes and its damage."""

    index: int
    bytes_read: float
    damage: float


def allocate(
    curves: Mapping[FFNSite, DamageCurve], budget: float, floors: Mapping[FFNSite, float] | None = None
) -> dict[FFNSite, int]:
    """The point of every FFN with little damage in sum, within a budget of bytes per token.

    Every FFN starts dense. Of the next steps along the lower convex envelopes of the curves, the one with the least
    damage per byte saved is taken until the budget is met; that is the optimum for every budget at which a step ends.
    The last FFN that was moved then takes its least harmful point that still meets the budget.

    Args:
        curves: one per FFN.
        budget: bytes of all these FFNs and their predictors, per token.
        floors: site -> lowest density it may have.

    Raises:
        UsageError: even the cheapest points are over the budget.
    """
    limits = floors or {}
    points = {site: _allowed(curve, limits.get(site, 0.0)) for site, curve in curves.items()}
    steps: list[tuple[float, int, FFNSite, Point, Point]] = []
    for number, (site, options) in enumerate(points.items()):
        path = envelope(options)
        for before, after in itertools.pairwise(path):
            slope = (after.damage - before.damage) / (before.bytes_read - after.bytes_read)
            steps.append((slope, number, site, before, after))
    chosen = {site: options[0] for site, options in points.items()}
    total = sum(one.bytes_read for one in chosen.values())
    for _, _, site, before, after in sorted(steps, key=lambda step: step[:2]):
        if total <= budget:
            break
        chosen[site], total = after, total - before.bytes_read + after.bytes_read
        if total <= budget:
            spare = budget - (total - after.bytes_read)
            fitting = [one for one in points[site] if one.bytes_read <= spare]
            chosen[site] = min(fitting, key=lambda one: (one.damage, one.bytes_read))
    if total > budget:
        raise UsageError(
            f"the cheapest allocation reads {total:,.0f} bytes per token, above the budget of {budget:,.0f}. Raise the "
            "budget, lower the floors of the first and last FFNs, or measure lower densities."
        )
    return {site: one.index for site, one in chosen.items()}


def envelope(points: list[Point]) -> list[Point]:
    """The lower convex envelope from the first point towards fewer bytes: vertices, in that order.

    Points that read more than the first (an FFN that keeps nearly all channels, and a predictor) are never on it.
    """
    best = sorted((p for p in points if p.bytes_read < points[0].bytes_read), key=lambda p: (-p.bytes_read, p.damage))
    path = [points[0]]
    for point in best:
        if point.bytes_read >= path[-1].bytes_read:
            continue  # as many bytes and more damage
        while len(path) > 1 and _slope(path[-2], point) <= _slope(path[-2], path[-1]):
            path.pop()
        path.append(point)
    return path


def _slope(before: Point, after: Point) -> float:
    """Damage per byte saved."""
    return (after.damage - before.damage) / (before.bytes_read - after.bytes_read)


def _allowed(curve: DamageCurve, floor: float) -> list[Point]:
    rows = zip(curve.bytes_read.tolist(), curve.damage.tolist(), curve.density.tolist(), strict=True)
    return [Point(i, cost, damage) for i, (cost, damage, density) in enumerate(rows) if i == 0 or density >= floor]
