from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffnscope.errors import UnknownNameError, UsageError
from ffnscope.plan.allocate import kept_count
from ffnscope.plan.build import build_plan, diff_plans, top_core
from ffnscope.types import Budget, FFNSite, PruningPlan, Scores


def scores_of(*values: list[float]) -> Scores:
    sites = [FFNSite(i, f"layers.{i}.mlp", None, "up", "down", 4, len(row)) for i, row in enumerate(values)]
    return Scores("wanda", {s: torch.tensor(v) for s, v in zip(sites, values, strict=True)}, {"text": "t"})


def kept(plan: PruningPlan) -> list[list[int]]:
    return [index.tolist() for index in plan.kept.values()]


class TestBuild:
    def test_the_highest_stay_in_the_order_of_the_model(self) -> None:
        plan = build_plan(scores_of([1.0, 9.0, 3.0, 7.0], [4.0, 1.0, 2.0, 3.0]), 0.5)
        assert kept(plan) == [[1, 3], [0, 3]]
        assert (plan.metric, plan.allocator, plan.budget, plan.sparsity) == ("wanda", "local", Budget(0.5), 0.5)

    def test_equal_scores_stay_in_order_of_index(self) -> None:
        assert kept(build_plan(scores_of([1.0] * 6), 0.5)) == [[0, 1, 2]]
        assert kept(build_plan(scores_of([1.0, 2.0] * 5000), 0.25)) == [
            sorted([*range(1, 10000, 2), *range(0, 5000, 2)])
        ]
        assert kept(build_plan(scores_of([1.0] * 4, [1.0] * 4), 0.5, "global")) == [[0, 1, 2], [0]]

    def test_global_keeps_the_highest_of_the_model(self) -> None:
        assert kept(build_plan(scores_of([9.0, 8.0, 7.0, 1.0], [2.0, 3.0, 0.0, 1.0]), 0.5, "global")) == [
            [0, 1, 2],
            [1],
        ]

    def test_no_sparsity_keeps_all(self) -> None:
        for allocator in ("local", "global"):
            assert kept(build_plan(scores_of([1.0, 2.0], [3.0]), 0.0, allocator)) == [[0, 1], [0]]
            whole = build_plan(scores_of([1.0] * 10), Budget(0.0, multiple_of=4), allocator)
            assert kept(whole) == [list(range(10))]

    def test_what_is_recorded(self) -> None:
        plan = build_plan(scores_of([1.0, 2.0]), Budget(0.5, 1, 1), provenance={"model": "m"})
        assert plan.provenance == {"text": "t", "model": "m"}

    def test_unknown_allocator(self) -> None:
        with pytest.raises(UnknownNameError, match=r"Unknown allocator 'globl'. Did you mean 'global'\?"):
            build_plan(scores_of([1.0]), 0.5, "globl")

    @given(
        st.lists(st.lists(st.integers(-2, 2).map(float), min_size=1, max_size=16), min_size=1, max_size=4),
        st.integers(0, 99).map(lambda n: n / 100),
    )
    def test_no_removed_channel_is_above_a_kept_one(self, values: list[list[float]], sparsity: float) -> None:
        scores = scores_of(*values)
        for site, index in build_plan(scores, sparsity).kept.items():
            mask = torch.zeros(site.d_ff, dtype=torch.bool)
            mask[index] = True
            value = scores.values[site]
            assert index.numel() == max(1, kept_count(site.d_ff, sparsity))
            assert mask.all() or value[mask].min() >= value[~mask].max()

    @given(st.permutations(list(range(12))), st.integers(0, 99).map(lambda n: n / 100))
    def test_a_permutation_of_the_channels_permutes_the_plan(self, order: list[int], sparsity: float) -> None:
        value = [float(i) for i in range(12)]
        (plain,) = kept(build_plan(scores_of(value), sparsity))
        (moved,) = kept(build_plan(scores_of([value[i] for i in order]), sparsity))
        assert sorted(order[i] for i in moved) == plain


class TestProtection:
    @pytest.mark.parametrize("allocator", ["local", "global"])
    @pytest.mark.parametrize("shift", [0.0, -100.0, 1e30])
    def test_protected_channels_stay(self, allocator: str, shift: float) -> None:
        scores = scores_of([0.0 + shift, 1.0 + shift, 2.0 + shift, 3.0 + shift], [0.5 + shift] * 4)
        core = {scores.sites[0]: torch.tensor([1, 0, 0])}
        plan = build_plan(scores, 0.5, allocator, protected=core)
        assert {0, 1} <= set(kept(plan)[0])
        assert plan.protected[scores.sites[0]].tolist() == [0, 1]
        assert plan.sparsity == 0.5
        assert torch.equal(scores.values[scores.sites[0]], torch.tensor([0.0, 1.0, 2.0, 3.0]) + shift)

    def test_a_protected_channel_is_above_the_best_of_the_others(self) -> None:
        scores = scores_of([5.0, 5.0, 5.0, 0.0], [5.0] * 4)
        core = {scores.sites[0]: torch.tensor([3])}
        assert kept(build_plan(scores, 0.5, protected=core)) == [[0, 3], [0, 1]]
        assert kept(build_plan(scores, 0.5, "global", protected=core)) == [[0, 1, 3], [0]]

    @pytest.mark.parametrize("allocator", ["local", "global", "halfway", "standardised", "outliers"])
    def test_a_site_keeps_what_is_protected_in_it(self, allocator: str) -> None:
        """More than the allocator would give it, at the cost of the others."""
        scores = scores_of([float(n) for n in range(10)], [float(n) for n in range(10)], [10.0 + n for n in range(10)])
        core = {scores.sites[0]: torch.arange(8)}
        plan = build_plan(scores, 0.5, allocator, protected=core)
        assert kept(plan)[0] == list(range(8)) and plan.sparsity == 0.5
        assert min(plan.widths.values()) >= 1
        one = build_plan(scores, 0.9, allocator, protected={scores.sites[1]: torch.tensor([0])})
        assert 0 in kept(one)[1] and sum(one.widths.values()) == 3  # 1 channel is no share of 100 %

    def test_protection_in_multiples(self) -> None:
        scores = scores_of(*[[float(n) for n in range(16)]] * 3)
        core = {scores.sites[0]: torch.arange(9)}
        for allocator in ("local", "global", "halfway", "standardised", "outliers"):
            plan = build_plan(scores, Budget(0.5, 4), allocator, protected=core)
            assert set(range(9)) <= set(kept(plan)[0]) and list(plan.widths.values()) == [12, 8, 4], allocator
        message = r"layers.0.mlp cannot keep its 15 protected channels: of 18, the most that is a multiple of 7 is 14."
        with pytest.raises(UsageError, match=message):
            build_plan(
                scores_of([1.0] * 18),
                Budget(0.1, 7),
                protected={FFNSite(0, "layers.0.mlp", None, "up", "down", 4, 18): torch.arange(15)},
            )

    def test_more_protected_than_kept(self) -> None:
        scores = scores_of([1.0] * 8)
        message = r"leaves 4 channels in 1 FFNs, fewer than the 5 that are protected .* Lower the sparsity"
        with pytest.raises(UsageError, match=message):
            build_plan(scores, 0.5, protected={scores.sites[0]: torch.arange(5)})
        message = r"leaves 16 channels in 2 FFNs, fewer than the 18 .*, the most of them in layers.1.mlp \(12\)"
        with pytest.raises(UsageError, match=message):
            floors = Budget(0.5, min_keep={"layers.1.mlp": 12})
            build_plan(
                scores_of([1.0] * 16, [1.0] * 16),
                floors,
                protected={FFNSite(0, "layers.0.mlp", None, "up", "down", 4, 16): torch.arange(6)},
            )

    def test_protection_beside_thousands_of_sites(self) -> None:
        scores = scores_of(*[[3.0, 1.0, 2.0, 0.0]] * 3000)
        start = time.perf_counter()
        plan = build_plan(scores, 0.5, "halfway", protected=top_core(scores, count=1))
        assert time.perf_counter() - start < 20 and plan.sparsity == 0.5

    @pytest.mark.parametrize("index", [torch.tensor([8]), torch.tensor([-1])])
    def test_protected_out_of_range(self, index: Tensor) -> None:
        scores = scores_of([1.0] * 8)
        with pytest.raises(UsageError, match=r"protected channels of layers.0.mlp must be in \[0, 8\)"):
            build_plan(scores, 0.5, protected={scores.sites[0]: index})

    def test_protected_of_an_unknown_site(self, site: FFNSite) -> None:
        with pytest.raises(UsageError, match=r"protected channels are given for elsewhere, which has no scores"):
            build_plan(scores_of([1.0] * 8), 0.5, protected={replace(site, path="elsewhere"): torch.tensor([0])})


class TestCore:
    def test_by_hand(self) -> None:
        scores = scores_of([1.0, 9.0, 3.0, 7.0], [1.0] * 10)
        core = top_core(scores, 0.3)
        assert [i.tolist() for i in core.values()] == [[1], [0, 1, 2]]
        assert [i.tolist() for i in top_core(scores, count=2).values()] == [[1, 3], [0, 1]]
        assert [i.numel() for i in top_core(scores, 1.0).values()] == [4, 10]
        assert [i.numel() for i in top_core(scores, count=99).values()] == [4, 10]

    def test_at_least_one(self) -> None:
        assert [i.tolist() for i in top_core(scores_of([1.0, 2.0, 0.0])).values()] == [[1]]

    @pytest.mark.parametrize("fraction", [0.0, 1.1, -0.5, float("nan")])
    def test_fraction(self, fraction: float) -> None:
        with pytest.raises(UsageError, match=r"core fraction must be in \(0, 1\], the share of channels in the core"):
            top_core(scores_of([1.0]), fraction)

    def test_count(self) -> None:
        with pytest.raises(UsageError, match="the core must have at least 1 channel per site; got 0"):
            top_core(scores_of([1.0]), count=0)


class TestDiff:
    def test_by_hand(self) -> None:
        first = build_plan(scores_of([4.0, 3.0, 2.0, 1.0]), 0.5)
        second = build_plan(scores_of([4.0, 0.0, 2.0, 1.0]), 0.25)
        (row,) = diff_plans(first, second)
        assert row == {
            "site": "layers.0.mlp",
            "width_a": 2,
            "width_b": 3,
            "only_a": 1,
            "only_b": 2,
            "jaccard": 0.25,
        }

    def test_other_sites(self) -> None:
        first, second = build_plan(scores_of([1.0]), 0.0), build_plan(scores_of([1.0], [1.0]), 0.0)
        with pytest.raises(UsageError, match=r"layers.1.mlp is in only one of the two plans"):
            diff_plans(first, second)
