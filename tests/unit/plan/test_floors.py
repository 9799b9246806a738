"""Floors hold whatever the allocator, totals stay exact, and what cannot be met is refused."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnscope.errors import UsageError
from ffnscope.io import plan_from_dict, plan_to_dict
from ffnscope.plan.allocate import kept_count, local
from ffnscope.plan.build import build_plan
from ffnscope.plan.curves import Curves
from ffnscope.plan.floors import floor_of, least_width
from ffnscope.registry import ALLOCATORS, allocator
from ffnscope.types import Budget, FFNSite, PruningPlan, Scores

NAMES = ("local", "global", "halfway", "standardised", "outliers", "measured")


def scores_of(widths: list[int], seed: int = 0) -> Scores:
    random = torch.Generator().manual_seed(seed)
    values: dict[FFNSite, torch.Tensor] = {}
    for i, d_ff in enumerate(widths):
        site = FFNSite(i, f"layers.{i}.mlp", None, "up", "down", 4, d_ff)
        values[site] = torch.rand(d_ff, generator=random, dtype=torch.float64).pow(1 + i) * (1 + i)
    return Scores("made up", values)


def plan_of(scores: Scores, budget: Budget, name: str) -> PruningPlan:
    curves = None
    if ALLOCATORS.get(name).needs_curves:
        points = {
            s: (torch.tensor([s.d_ff // 2]), torch.tensor([float(1 + i)]))
            for i, s in enumerate(scores.values)
            if s.d_ff > 1
        }
        curves = Curves(points, "nats per token")
    return build_plan(scores, budget, name, curves=curves)


floors = st.dictionaries(
    st.sampled_from(["layers.0.mlp", "layers.1.mlp", "layers.[12].mlp", "*"]),
    st.one_of(st.integers(0, 10).map(lambda n: n / 10), st.integers(2, 12)),
    max_size=3,
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.integers(12, 60), min_size=3, max_size=5),
    st.integers(1, 95).map(lambda n: n / 100),
    st.one_of(floors, st.integers(0, 9).map(lambda n: n / 10)),
    st.sampled_from([1, 1, 4, 8]),
    st.integers(0, 3),
)
def test_floors_hold_and_the_total_is_exact(
    name: str, widths: list[int], sparsity: float, min_keep: float | dict[str, float], step: int, seed: int
) -> None:
    scores = scores_of(widths, seed)
    budget = Budget(sparsity, step, min_keep=min_keep)
    target = kept_count(sum(widths), sparsity)
    asked = {s: floor_of(s, budget) for s in scores.values}
    try:
        found = plan_of(scores, budget, name).widths
    except UsageError:
        impossible = any(-(-f // step) * step > s.d_ff for s, f in asked.items())
        assert impossible or sum(-(-f // step) * step for f in asked.values()) > target
        return
    assert all(w >= asked[s] and w % step == 0 and w <= s.d_ff for s, w in found.items())
    bound = any(asked[s] > max(1, kept_count(s.d_ff, sparsity)) for s in found)
    if name in ("local", "outliers") and not bound:
        return  # where no site has more outliers than another, each is rounded by itself
    missing = target - sum(found.values())
    full = all(w + step > s.d_ff for s, w in found.items())
    least = all(w - step < asked[s] or w == step for s, w in found.items())
    assert 2 * abs(missing) <= step or (missing > 0 and full) or (missing < 0 and least)


@given(st.integers(1, 5000), st.integers(0, 100))
def test_a_share_is_rounded_up(d_ff: int, percent: int) -> None:
    site = FFNSite(0, "mlp", None, "up", "down", 4, d_ff)
    exact = math.ceil(Fraction(percent, 100) * d_ff)
    assert floor_of(site, Budget(0.5, min_keep=percent / 100)) == max(1, exact)


def test_by_hand() -> None:
    scores = scores_of([20, 20, 20])
    found = local(scores, Budget(0.5, min_keep={"layers.0.mlp": 0.8}))
    assert list(found.values()) == [16, 7, 7]
    found = local(scores, Budget(0.5, min_keep={"*": 0.3, "layers.0.mlp": 18}))
    assert list(found.values()) == [18, 6, 6]
    plan = build_plan(scores, Budget(0.5, multiple_of=4, min_keep={"layers.[01].mlp": 0.55}), "global")
    assert list(plan.widths.values()) == [12, 12, 8]  # 32 is the nearest that multiples and floors leave
    whole = build_plan(scores, Budget(0.3, min_keep={"layers.2.mlp": 1}), "outliers")
    assert whole.widths[list(whole.kept)[2]] == 20 and whole.sparsity == 0.3


def test_the_highest_floor_counts() -> None:
    site = FFNSite(0, "layers.0.mlp", None, "up", "down", 4, 100)
    budget = Budget(0.5, 8, 10, {"*": 0.2, "layers.?.mlp": 30, "other": 0.9})
    assert (floor_of(site, budget), least_width(site, budget)) == (30, 32)
    assert floor_of(site, Budget(0.5, min_width=40, min_keep=0.2)) == 40


def test_many_experts_are_no_slower() -> None:
    scores = scores_of([512] * 400)
    found = local(scores, Budget(0.5, min_keep={"layers.[0-9].mlp": 1.0}))
    assert sum(found.values()) == 400 * 256 and max(found.values()) == 512
    others = [w for s, w in found.items() if s.layer > 9]
    assert max(others) - min(others) <= 1


def test_protected_channels_and_floors() -> None:
    scores = scores_of([20, 20])
    first = next(iter(scores.values))
    lowest = torch.sort(scores.values[first]).indices[:3].sort().values
    plan = build_plan(scores, Budget(0.5, min_keep={"layers.0.mlp": 0.7}), protected={first: lowest})
    assert list(plan.widths.values()) == [14, 6]
    assert set(lowest.tolist()) <= set(plan.kept[first].tolist())


def test_floors_are_part_of_a_saved_plan(tmp_path: Path) -> None:
    budget = Budget(0.5, min_keep={"layers.0.mlp": 0.8})
    plan = build_plan(scores_of([20, 20]), budget)
    assert plan_from_dict(tmp_path, plan_to_dict(plan)).budget == budget


@pytest.mark.parametrize("floor", [-0.1, 1.5, float("nan"), 2.25])
def test_impossible_floors(floor: float) -> None:
    for given_ in (floor, {"*": floor}):
        with pytest.raises(UsageError, match=r"min_keep must be a share of the channels in \[0, 1\], or a"):
            Budget(0.5, min_keep=given_)


def test_what_cannot_be_met_is_said() -> None:
    scores = scores_of([20, 20])
    with pytest.raises(UsageError, match=r"keep 36 channels of 2 FFNs, the most in layers\.0\.mlp \(18\);.* 20"):
        build_plan(scores, Budget(0.5, min_keep=0.9))
    with pytest.raises(UsageError, match=r"min_keep asks for 21 channels of layers\.0\.mlp, which has 20"):
        build_plan(scores, Budget(0.5, min_keep=21))
    with pytest.raises(UsageError, match=r"'layers\.0\.mpl', which is no FFN .* Did you mean 'layers\.0\.mlp'"):
        build_plan(scores, Budget(0.5, min_keep={"layers.0.mpl": 0.9}))
    with pytest.raises(UsageError, match="no width of at least 20 that is a multiple of 8 fits into 20 channels"):
        build_plan(scores, Budget(0.2, multiple_of=8, min_keep={"layers.1.mlp": 1.0}))


def test_an_allocator_that_does_not_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ALLOCATORS.names()
    monkeypatch.setattr(ALLOCATORS, "_items", dict(ALLOCATORS._items))
    allocator("even_halves")(lambda scores, budget: {s: s.d_ff // 2 for s in scores.values})
    with pytest.raises(UsageError, match=r"'even_halves' gives layers\.0\.mlp 10 channels, fewer than its floor of 16"):
        build_plan(scores_of([20, 20]), Budget(0.5, min_keep={"layers.0.mlp": 0.8}), "even_halves")
