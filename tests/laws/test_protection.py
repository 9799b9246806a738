"""Protected channels stay, and change nothing that an allocator computes from the scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffnscope.plan.allocate import kept_count
from ffnscope.plan.build import build_plan
from ffnscope.plan.curves import Curves
from ffnscope.plan.nested import plan_within
from ffnscope.registry import ALLOCATORS, allocator
from ffnscope.types import Budget, FFNSite, PruningPlan, Scores

NAMES = ("local", "global", "halfway", "standardised", "outliers", "measured")
WIDTHS = (48, 48, 64, 40)


def scores_of(seed: int, widths: tuple[int, ...] = WIDTHS) -> Scores:
    """Heavy tails and another level in every site, so that all allocators but the first give different widths."""
    random = torch.Generator().manual_seed(seed)
    values: dict[FFNSite, Tensor] = {}
    for i, d_ff in enumerate(widths):
        site = FFNSite(i, f"layers.{i}.mlp", "gate", "up", "down", 8, d_ff)
        draw = torch.randn(d_ff, generator=random, dtype=torch.float64)
        values[site] = torch.exp(draw * (0.8 + 0.4 * i)) * (1 + 0.2 * i)
    return Scores("made up", values)


def random_core(scores: Scores, seed: int, share: float) -> dict[FFNSite, Tensor]:
    """Any channels, good or bad, of every site but the last."""
    random = torch.Generator().manual_seed(seed)
    chosen = scores.sites[:-1]
    return {s: torch.randperm(s.d_ff, generator=random)[: round(share * s.d_ff)] for s in chosen}


def planned(name: str, scores: Scores, budget: Budget, core: Mapping[FFNSite, Tensor] | None = None) -> PruningPlan:
    points = {
        s: (torch.tensor([s.d_ff // 8, s.d_ff // 2]), torch.tensor([3.0 + i, 0.5])) for i, s in enumerate(scores.values)
    }
    curves = Curves(points, "nats per token") if ALLOCATORS.get(name).needs_curves else None
    return build_plan(scores, budget, name, protected=core, curves=curves)


def test_every_allocator_is_here() -> None:
    own = [name for name in ALLOCATORS.names() if ALLOCATORS.get(name).fn.__module__.startswith("ffnscope.")]
    assert set(own) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), sparsity=st.sampled_from([0.1, 0.3, 0.5]), share=st.floats(0.0, 0.12))
def test_the_widths_are_those_without_protection(name: str, seed: int, sparsity: float, share: float) -> None:
    """As long as no site has more protected channels than it would keep."""
    scores, budget = scores_of(seed), Budget(sparsity)
    core = random_core(scores, seed + 1, share)
    bare = planned(name, scores, budget)
    if any(bare.widths[site] < index.numel() for site, index in core.items()):
        return
    found = planned(name, scores, budget, core)
    assert found.widths == bare.widths
    for site, kept in found.kept.items():
        mask, own = found.mask(site), core.get(site, torch.tensor([], dtype=torch.int64))
        assert bool(mask[own].all())
        others = mask.clone()
        others[own] = False
        if bool(others.any()) and not bool(mask.all()):  # the best of those that are not protected
            assert scores.values[site][others].min() >= scores.values[site][~mask].max()
        assert kept.numel() == found.widths[site]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), sparsity=st.sampled_from([0.3, 0.5, 0.7]), share=st.floats(0.0, 0.3))
def test_the_budget_is_met_and_the_core_stays(name: str, seed: int, sparsity: float, share: float) -> None:
    """Also where sites have more protected channels than the allocator would leave them."""
    scores = scores_of(seed)
    core = random_core(scores, seed + 1, share)
    core[scores.sites[0]] = torch.arange(24)
    found = planned(name, scores, Budget(sparsity), core)
    off = abs(sum(found.widths.values()) - kept_count(sum(WIDTHS), sparsity))
    assert off <= (len(WIDTHS) / 2 if name == "local" else 0)  # local rounds in every site
    assert min(found.widths.values()) >= 1
    assert all(bool(found.mask(site)[index].all()) for site, index in core.items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [4, 8])
def test_multiples(name: str, step: int) -> None:
    for seed in range(10):
        scores = scores_of(seed)
        core = random_core(scores, seed + 1, 0.2)
        found = planned(name, scores, Budget(0.5, step), core)
        assert all(width % step == 0 for width in found.widths.values())
        assert abs(sum(found.widths.values()) - sum(WIDTHS) / 2) <= step / 2
        assert all(bool(found.mask(site)[index].all()) for site, index in core.items())


def test_an_allocator_is_given_the_scores_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    ALLOCATORS.names()
    monkeypatch.setattr(ALLOCATORS, "_items", dict(ALLOCATORS._items))
    seen: list[Any] = []

    @allocator("records")
    def _(scores: Scores, budget: Budget) -> dict[FFNSite, int]:  # pyright: ignore[reportUnusedFunction]
        seen.append((scores, budget))
        return {s: s.d_ff // 2 for s in scores.values}

    scores = scores_of(3)
    plan = build_plan(scores, 0.5, "records", protected=random_core(scores, 4, 0.2))
    ((given_scores, budget),) = seen
    assert all(torch.equal(value, scores.values[site]) for site, value in given_scores.values.items())
    assert (budget.sparsity, plan.budget) == (0.5, Budget(0.5))  # floors of the core are not those of the user


@pytest.mark.parametrize("name", ["standardised", "outliers"])
def test_equal_sites_stay_equal(name: str) -> None:
    """A core of 5 %, or one protected channel, once gave one of two alike sites up to a quarter more than the other."""
    draw = torch.Generator().manual_seed(0)
    value = torch.rand(48, generator=draw, dtype=torch.float64)
    sites = [FFNSite(i, f"layers.{i}.mlp", "gate", "up", "down", 8, 48) for i in range(2)]
    scores = Scores("made up", {sites[0]: value, sites[1]: value.flip(0)})
    low = value.argsort()[:3]
    for core in ({sites[0]: low[:1]}, {sites[0]: low}, {sites[0]: value.argmax()[None], sites[1]: low}):
        assert list(planned(name, scores, Budget(0.5), core).widths.values()) == [24, 24]


@pytest.mark.parametrize("name", NAMES[:-1])
def test_in_rounds(name: str) -> None:
    for seed in range(5):
        scores = scores_of(seed)
        core = random_core(scores, seed + 1, 0.1)
        first = planned(name, scores, Budget(0.3), core)
        second = plan_within(scores_of(seed + 50), Budget(0.5), name, first, core)
        assert sum(second.widths.values()) == sum(WIDTHS) / 2
        assert all(bool(second.mask(site)[index].all()) for site, index in core.items())
