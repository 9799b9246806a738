"""Plans within plans: what is gone stays gone, and the budget is met."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ffnscope.errors import UsageError
from ffnscope.plan.build import build_plan, top_core
from ffnscope.plan.nested import plan_within, round_sparsities
from ffnscope.types import Budget, FFNSite, PruningPlan, Scores

SITES = [FFNSite(i, f"layers.{i}.mlp", "gate", "up", "down", 4, 12, "silu") for i in range(3)]


def scores(seed: int, **facts: object) -> Scores:
    draw = torch.Generator().manual_seed(seed)
    scale = torch.rand(3, generator=draw) * 4
    return Scores("random", {s: torch.rand(12, generator=draw) * scale[i] for i, s in enumerate(SITES)}, facts)


def n_kept(plan: PruningPlan) -> int:
    return sum(plan.widths.values())


def test_every_round_keeps_the_same_share() -> None:
    assert round_sparsities(0.75, 2) == [0.5, 0.75]
    found = round_sparsities(0.5, 3)
    assert found[-1] == 0.5 and found == sorted(found)
    left = [1.0, *(1 - share for share in found)]
    assert [b / a for a, b in pairwise(left)] == pytest.approx([0.5 ** (1 / 3)] * 3)
    assert round_sparsities(0.3, 1) == [0.3]


@pytest.mark.parametrize("allocator", ["local", "global", "halfway", "standardised", "outliers"])
@pytest.mark.parametrize("step", [1, 4])
def test_what_is_gone_stays_gone(allocator: str, step: int) -> None:
    for seed in range(20):
        first = build_plan(scores(seed), Budget(0.25, step), allocator)
        second = plan_within(scores(100 + seed), Budget(0.5, step), allocator, first)
        assert (second.budget, second.allocator) == (Budget(0.5, step), allocator)
        for site, kept in second.kept.items():
            assert set(kept.tolist()) <= set(first.kept[site].tolist())
            assert kept.numel() % step == 0
        if step == 1:
            assert n_kept(second) == 6 * 3, (seed, second.widths)
        assert n_kept(second) <= n_kept(first)


def test_within_the_same_scores_it_is_the_plan_itself() -> None:
    one = scores(1)
    for allocator in ("local", "global"):
        first, straight = (build_plan(one, share, allocator) for share in (0.25, 0.5))
        found = plan_within(one, Budget(0.5), allocator, first)
        assert all(torch.equal(kept, straight.kept[site]) for site, kept in found.kept.items())


def test_values_of_removed_channels_are_not_read() -> None:
    one = scores(1)
    first = build_plan(one, 0.25, "global")
    high = {site: value.clone() for site, value in one.values.items()}
    for site in SITES:
        high[site][first.removed(site)] = 1e9
    found, plain = (plan_within(each, Budget(0.5), "global", first) for each in (Scores("random", high), one))
    assert all(torch.equal(kept, plain.kept[site]) for site, kept in found.kept.items())


def test_protected_channels_stay() -> None:
    core = top_core(scores(0), 0.25)
    first = build_plan(scores(0), 0.25, "global", protected=core)
    second = plan_within(scores(7), Budget(0.5), "global", first, core)
    for site, index in core.items():
        assert set(index.tolist()) <= set(second.kept[site].tolist())
    assert second.protected.keys() == core.keys() and n_kept(second) == 18


def test_unreached_experts_keep_what_they_have() -> None:
    first = build_plan(scores(0), 0.25)
    second = plan_within(scores(7, unreached=[SITES[1].name]), Budget(0.5), "local", first)
    assert torch.equal(second.kept[SITES[1]], first.kept[SITES[1]])
    assert [second.widths[site] for site in SITES] == [6, 9, 6]


def test_impossible_budgets() -> None:
    first = build_plan(scores(0), 0.25)
    with pytest.raises(UsageError, match="no width of at least 13"):
        plan_within(scores(1), Budget(0.5, min_width=13), "local", first)
