"""Policies by hand, and the laws that all of them keep."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.registry import POLICIES
from ffnscope.sparse.policies import (
    BankTopK,
    CappedThreshold,
    ChannelThreshold,
    Hybrid,
    Nucleus,
    Policy,
    StatisticalTopK,
    Threshold,
    TopK,
    channel_gain,
)

D_FF = 24
SCORES = torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.0, 0.0, 5.0, 5.0]])


def random_scores(n: int = 40, seed: int = 0) -> Tensor:
    return torch.rand(n, D_FF, generator=torch.Generator().manual_seed(seed)) ** 2


ALL: dict[str, tuple[Policy, list[float]]] = {
    "top_k": (TopK(), [0, 1, 5, 23, 24]),
    "threshold": (Threshold(), [2.0, 0.5, 0.1, 0.0]),
    "channel_threshold": (ChannelThreshold(torch.linspace(0.5, 2, D_FF)), [3.0, 0.5, 0.1, 0.0]),
    "nucleus": (Nucleus(), [0.0, 0.3, 0.6, 0.95, 1.0]),
    "capped_threshold": (CappedThreshold(2, 20), [2.0, 0.5, 0.1, 0.0]),
    "statistical_top_k": (StatisticalTopK(), [3.0, 1.0, 0.0, -1.0, -9.0]),
    "bank_top_k": (BankTopK(5), [0, 1, 3, 5]),
    "hybrid": (Hybrid(torch.tensor([3, 11]), TopK()), [0, 4, 22]),
}


def kept(policy: Policy, parameter: float, scores: Tensor = SCORES) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in policy.select(scores, parameter)]


def test_every_policy_is_registered_and_tested() -> None:
    assert set(ALL) == set(POLICIES.names())
    assert all(POLICIES.get(name).summary for name in ALL)
    assert list(POLICIES.get("capped_threshold").params) == ["k_min", "k_max"]


class TestByHand:
    def test_top_k_takes_the_first_of_equals(self) -> None:
        assert kept(TopK(), 2) == [[0, 2], [2, 3]]
        assert kept(TopK(), 3) == [[0, 2, 3], [0, 2, 3]]

    @pytest.mark.parametrize("k", [0, 1, 3, 11, 24, 99])
    def test_top_k_by_rank_and_by_selection_are_the_same(self, k: int) -> None:
        scores = (random_scores() * 6).round()  # ties
        assert torch.equal(TopK().select(scores, k), TopK().keys(scores) >= -k)
        assert bool((TopK().select(scores, k).sum(1) == min(k, D_FF)).all())

    def test_threshold_includes_itself(self) -> None:
        assert kept(Threshold(), 3.0) == [[0, 2], [2, 3]]

    def test_channel_threshold(self) -> None:
        policy = ChannelThreshold(torch.tensor([0.0, 10.0, 1.0, 1.0]))
        assert kept(policy, 4.0) == [[1], [2, 3]]
        assert policy.thresholds(4.0).tolist() == [math.inf, pytest.approx(0.4), 4.0, 4.0]

    def test_nucleus(self) -> None:  # masses .4 .3 .2 .1, of the second row .5 .5
        assert kept(Nucleus(), 0.4) == [[0], [2]]
        assert kept(Nucleus(), 0.41) == [[0, 2], [2]]
        assert kept(Nucleus(), 0.7) == [[0, 2], [2, 3]]
        assert kept(Nucleus(), 0.99) == [[0, 1, 2, 3], [2, 3]]
        assert kept(Nucleus(), 1) == [[0, 1, 2, 3], [0, 1, 2, 3]]
        assert kept(Nucleus(), 0) == [[], []]

    def test_nucleus_without_mass_keeps_nothing_below_one(self) -> None:
        assert kept(Nucleus(), 0.9, torch.zeros(1, 3)) == [[]]

    def test_capped_threshold(self) -> None:
        policy = CappedThreshold(1, 2)
        assert kept(policy, 9.0) == [[0], [2]]
        assert kept(policy, 3.5) == [[0], [2, 3]]
        assert kept(policy, 0.0) == [[0, 2], [2, 3]]

    def test_statistical_top_k(self) -> None:  # mean 2.5, both rows; std sqrt(1.25) and 2.5
        assert kept(StatisticalTopK(), 1.0) == [[0], [2, 3]]
        assert kept(StatisticalTopK(), 1.01) == [[0], []]
        assert kept(StatisticalTopK(), 1.35) == [[], []]

    def test_bank_top_k_and_a_smaller_last_bank(self) -> None:
        assert kept(BankTopK(2), 1) == [[0, 2], [0, 2]]
        assert kept(BankTopK(3), 1) == [[0, 3], [2, 3]]

    def test_hybrid_ranks_only_the_others(self) -> None:
        assert kept(Hybrid(torch.tensor([0]), TopK()), 1) == [[0, 2], [0, 2]]
        assert kept(Hybrid(torch.tensor([0, 1, 2, 3]), TopK()), 0) == [[0, 1, 2, 3]] * 2

    def test_channel_gain(self) -> None:
        scores = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 2.0]])
        c = torch.tensor([[1.0, 5.0, 0.0], [0.0, 5.0, 2.0]])
        assert channel_gain(scores, c).tolist() == [0.25, 0.0, 0.5]


@pytest.mark.parametrize("name", list(ALL))
class TestLaws:
    def test_nested_from_few_to_many(self, name: str) -> None:
        policy, parameters = ALL[name]
        masks = [policy.select(random_scores(), p) for p in parameters]
        for fewer, more in itertools.pairwise(masks):
            assert bool((fewer <= more).all())
            assert int(fewer.sum()) < int(more.sum())

    def test_a_token_does_not_depend_on_others(self, name: str) -> None:
        policy, parameters = ALL[name]
        scores = random_scores()
        alone = torch.cat([policy.select(row[None], parameters[1]) for row in scores])
        assert torch.equal(alone, policy.select(scores, parameters[1]))

    def test_order_of_channels(self, name: str) -> None:
        if name in ("bank_top_k", "channel_threshold", "hybrid"):
            pytest.skip("channels are not alike")
        policy, parameters = ALL[name]
        order = torch.randperm(D_FF, generator=torch.Generator().manual_seed(1))
        scores = random_scores()
        for p in parameters:
            assert torch.equal(policy.select(scores[:, order], p), policy.select(scores, p)[:, order])

    def test_level_and_parameter_are_two_names_of_one_thing(self, name: str) -> None:
        policy, parameters = ALL[name]
        scores = random_scores()
        for p in parameters:
            again = policy.natural(policy.level(p))
            assert torch.equal(policy.select(scores, p), policy.select(scores, again))
            assert again == pytest.approx(p, rel=1e-6)

    def test_scores_are_not_changed(self, name: str) -> None:
        policy, parameters = ALL[name]
        scores = random_scores()
        policy.select(scores, parameters[0])
        assert torch.equal(scores, random_scores())

    def test_bad_scores(self, name: str) -> None:
        policy, parameters = ALL[name]
        with pytest.raises(UsageError, match=r"\[T, d_ff\]"):
            policy.select(torch.rand(D_FF), parameters[0])
        with pytest.raises(NonFiniteError):
            policy.select(torch.full((1, D_FF), math.nan), parameters[0])
        with pytest.raises(UsageError, match="finite"):
            policy.select(random_scores(), math.nan)


def test_impossible_options_and_parameters() -> None:
    for make, message in (
        (lambda: TopK().level(-1), "whole number"),
        (lambda: TopK().level(1.5), "whole number"),
        (lambda: Nucleus().level(1.1), r"\[0, 1\]"),
        (lambda: Nucleus().keys(torch.tensor([[-1.0]])), "not negative"),
        (lambda: CappedThreshold(3, 2), "k_min"),
        (lambda: BankTopK(0), "at least 1"),
        (lambda: ChannelThreshold(torch.tensor([-1.0])), "not negative"),
        (lambda: ChannelThreshold(torch.ones(3)).keys(SCORES), "3 gains"),
        (lambda: Hybrid(torch.tensor([1, 1]), TopK()), "distinct"),
        (lambda: Hybrid(torch.tensor([7]), TopK()).keys(SCORES), r"\[0, 4\)"),
    ):
        with pytest.raises(UsageError, match=message):
            make()
