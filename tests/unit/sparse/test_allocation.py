"""Allocations by hand, and against all choices."""

from __future__ import annotations

import itertools

import pytest
import torch

from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.sparse.allocation import DamageCurve, Point, allocate, envelope
from ffnscope.types import FFNSite


def site(layer: int) -> FFNSite:
    return FFNSite(layer, f"layers.{layer}.mlp", "gate", "up", "down", 4, 8)


def curve(costs: list[float], damage: list[float], density: list[float] | None = None) -> DamageCurve:
    falling = torch.linspace(1, 0.1, len(costs)) if density is None else torch.tensor(density)
    return DamageCurve(torch.tensor(costs), torch.tensor(damage), falling)


def points(*rows: tuple[float, float]) -> list[Point]:
    return [Point(i, *row) for i, row in enumerate(rows)]


class TestEnvelope:
    def test_vertices(self) -> None:
        # from (10, 0): (8, 5) is above the line to (6, 4); (4, 6) and (2, 20) are vertices
        found = envelope(points((10, 0), (8, 5), (6, 4), (4, 6), (2, 20)))
        assert [one.index for one in found] == [0, 3, 4]  # slopes 1 and 7; (6, 4) lies on a slope of 1 too

    def test_a_predictor_makes_high_densities_dearer_than_dense(self) -> None:
        assert [one.index for one in envelope(points((10, 0), (12, 0.1), (10, 0.2), (7, 1)))] == [0, 3]


class TestAllocate:
    def test_the_cheapest_damage_goes_first(self) -> None:
        sturdy, frail = curve([10, 6, 2], [0, 1, 3]), curve([10, 6, 2], [0, 4, 9])
        curves = {site(0): sturdy, site(1): frail}
        choices = [tuple(allocate(curves, budget).values()) for budget in (20, 16, 12, 8, 4)]
        assert choices == [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2)]

    def test_the_last_step_takes_no_more_than_it_must(self) -> None:
        # (6, 1) is above the envelope from (10, 0) to (2, 1.5), but enough for the budget
        curves = {site(0): curve([10, 6, 2], [0, 1, 1.5])}
        assert allocate(curves, 6) == {site(0): 1}
        assert allocate(curves, 5.9) == {site(0): 2}

    def test_floors(self) -> None:
        curves = {site(i): curve([10, 6, 2], [0, 1, 3], [1, 0.5, 0.1]) for i in range(2)}
        assert allocate(curves, 8, {site(0): 0.5}) == {site(0): 1, site(1): 2}
        with pytest.raises(UsageError, match="reads 8 bytes per token, above the budget of 7"):
            allocate(curves, 7, {site(0): 0.5})

    def test_optimal_at_the_budgets_where_a_step_ends(self) -> None:
        random = torch.Generator().manual_seed(0)
        curves = {}
        for layer in range(4):
            steps = torch.rand(4, generator=random).sort().values  # convex
            damage = torch.cat([torch.zeros(1), steps.cumsum(0)])
            curves[site(layer)] = DamageCurve(torch.tensor([10.0, 8, 6, 4, 2]), damage, torch.linspace(1, 0.2, 5))
        for budget in range(8, 41, 2):
            found = allocate(curves, budget)
            assert sum(float(curves[s].bytes_read[i]) for s, i in found.items()) <= budget
            best = min(
                sum(float(c.damage[i]) for c, i in zip(curves.values(), choice, strict=True))
                for choice in itertools.product(range(5), repeat=4)
                if sum(10 - 2 * i for i in choice) <= budget
            )
            assert sum(float(curves[s].damage[i]) for s, i in found.items()) == pytest.approx(best)

    def test_impossible_curves(self) -> None:
        with pytest.raises(NonFiniteError, match="NaN"):
            curve([1, 2], [0, torch.nan])
        with pytest.raises(UsageError, match="one damage"):
            curve([1, 2], [0])
