"""Allocators of unequal widths against what is computed by hand, and by trying everything."""

from __future__ import annotations

import itertools

import pytest
import torch

from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.plan.allocate import global_, local
from ffnscope.plan.build import build_plan
from ffnscope.plan.curves import Curves
from ffnscope.plan.unequal import halfway, measured, outliers, standardised
from ffnscope.types import Budget, FFNSite, Scores


def scores_of(*values: torch.Tensor) -> Scores:
    sites = [FFNSite(i, f"layers.{i}.mlp", None, "up", "down", 4, len(row)) for i, row in enumerate(values)]
    return Scores("made up", dict(zip(sites, values, strict=True)))


def curves_of(scores: Scores, *rows: tuple[list[int], list[float]]) -> Curves:
    pairs = [(torch.tensor(w), torch.tensor(r, dtype=torch.float64)) for w, r in rows]
    return Curves(dict(zip(scores.values, pairs, strict=True)), "nats per token")


class TestHalfway:
    def test_it_is_the_mean_of_both_ends(self) -> None:
        scores = scores_of(torch.arange(20.0), 100 + torch.arange(20.0))
        assert list(global_(scores, Budget(0.4)).values()) == [4, 20]
        assert list(local(scores, Budget(0.4)).values()) == [12, 12]
        assert list(halfway(scores, Budget(0.4)).values()) == [8, 16]
        assert list(halfway(scores, Budget(0.4, multiple_of=4)).values()) == [8, 16]
        assert list(halfway(scores, Budget(0.0)).values()) == [20, 20]

    def test_the_total_is_kept(self) -> None:
        torch.manual_seed(0)
        scores = scores_of(*(torch.rand(n) * (i + 1) for i, n in enumerate((37, 50, 61))))
        assert sum(halfway(scores, Budget(0.3)).values()) == 104  # 148 less 44.4


class TestStandardised:
    def test_the_level_of_a_site_plays_no_part(self) -> None:
        row = torch.tensor([1.0, 2.0, 3.0, 10.0])
        found = standardised(scores_of(row, 1000 * row + 7), Budget(0.5))
        assert list(found.values()) == [2, 2]
        assert list(global_(scores_of(row, 1000 * row + 7), Budget(0.5)).values()) == [1, 3]

    def test_a_site_of_equal_scores_counts_as_average(self) -> None:
        row = torch.tensor([0.0, 0.0, 0.0, 4.0])  # below average but for one
        assert list(standardised(scores_of(torch.ones(4), row), Budget(0.375)).values()) == [4, 1]


class TestOutliers:
    def test_by_hand(self) -> None:
        few = torch.ones(100, dtype=torch.float64)
        many = few.clone()
        many[:10] = 50  # mean 5.9, ten above 29.5
        found = outliers(scores_of(few, many), Budget(0.5))
        assert list(found.values()) == [42, 58]  # 0.5 less and plus 0.08
        assert list(outliers(scores_of(few, few), Budget(0.5)).values()) == [50, 50]
        assert list(outliers(scores_of(few, many), Budget(0.0)).values()) == [100, 100]


class TestMeasured:
    @pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.7])
    def test_no_choice_is_cheaper(self, sparsity: float) -> None:
        torch.manual_seed(1)
        scores = scores_of(*(torch.rand(8) for _ in range(3)))
        rises = [([2, 4, 6], (torch.rand(3) * (i + 1)).tolist()) for i in range(3)]
        curves = curves_of(scores, *rises)
        found = measured(scores, Budget(sparsity), curves=curves)
        costs = {s: curves.at(s, torch.arange(1, 9)).tolist() for s in scores.values}
        total = sum(found.values())
        assert total == round(24 * (1 - sparsity))
        least = min(
            sum(costs[s][w - 1] for s, w in zip(costs, widths, strict=True))
            for widths in itertools.product(range(2, 9), repeat=3)  # none is narrower than was measured
            if sum(widths) == total
        )
        assert sum(costs[s][w - 1] for s, w in found.items()) == pytest.approx(least)

    def test_a_coarse_grid_still_meets_the_budget(self) -> None:
        scores = scores_of(*(torch.rand(1537) for _ in range(4)))
        curves = curves_of(scores, *(([400, 800], [2.0 * i + 1, 0.5]) for i in range(4)))
        for budget in (Budget(0.5), Budget(0.33, multiple_of=7), Budget(0.5, min_width=300)):
            found = measured(scores, budget, curves=curves)
            assert abs(sum(found.values()) - (1 - budget.sparsity) * 4 * 1537) <= max(1, budget.multiple_of / 2)
            assert all(w % budget.multiple_of == 0 and w >= budget.min_width for w in found.values())

    def test_what_it_needs_is_said(self) -> None:
        scores = scores_of(torch.rand(8), torch.rand(8))
        with pytest.raises(UsageError, match="'measured' needs measured loss curves"):
            build_plan(scores, 0.5, "measured")
        one = scores_of(torch.rand(8))
        with pytest.raises(UsageError, match=r"the curves have no layers\.1\.mlp"):
            build_plan(scores, 0.5, "measured", curves=curves_of(one, ([4], [1.0])))
        plan = build_plan(scores, 0.5, "measured", curves=curves_of(scores, ([1], [1.0]), ([1], [5.0])))
        assert list(plan.widths.values()) == [1, 7]

    def test_no_width_is_narrower_than_was_measured_unless_it_must_be(self) -> None:
        scores = scores_of(torch.rand(20), torch.rand(20))
        curves = curves_of(scores, ([5, 10], [0.1, 0.1]), ([5, 10], [9.0, 3.0]))  # the first one costs no more below
        assert list(measured(scores, Budget(0.5), curves=curves).values()) == [5, 15]
        assert list(measured(scores, Budget(0.5, multiple_of=4), curves=curves).values()) == [8, 12]
        assert sum(measured(scores, Budget(0.8), curves=curves).values()) == 8


class TestCurves:
    def test_between_and_beyond_the_measured_widths(self) -> None:
        scores = scores_of(torch.rand(10))
        (site,) = scores.values
        curves = curves_of(scores, ([4, 6], [3.0, 1.0]))
        found = curves.at(site, torch.tensor([1, 4, 5, 6, 8, 10]))
        assert found.tolist() == pytest.approx([6.0, 3.0, 2.0, 1.0, 0.5, 0.0])

    def test_noise_does_not_make_a_narrower_site_look_better(self) -> None:
        scores = scores_of(torch.rand(10))
        (site,) = scores.values
        curves = curves_of(scores, ([2, 4, 8], [0.5, 1.0, -0.1]))
        assert curves.at(site, torch.tensor([2, 4, 8, 9])).tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0])

    @pytest.mark.parametrize(
        ("widths", "rise"), [([4, 4], [1.0, 1.0]), ([0], [1.0]), ([10], [0.0]), ([], []), ([3], [1.0, 2.0])]
    )
    def test_impossible_ones(self, widths: list[int], rise: list[float]) -> None:
        with pytest.raises(UsageError, match="expected rising widths"):
            curves_of(scores_of(torch.rand(10)), (widths, rise))

    def test_not_finite(self) -> None:
        with pytest.raises(NonFiniteError, match="NaN or infinite"):
            curves_of(scores_of(torch.rand(10)), ([4], [float("nan")]))
