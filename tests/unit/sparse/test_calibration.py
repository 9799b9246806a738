"""Calibrated parameters by hand, and by trying all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from ffnscope.errors import UnknownNameError, UsageError
from ffnscope.ffn.function import FFN
from ffnscope.sparse.calibration import Scored, Target, calibrate_policy, mean_of, scored
from ffnscope.sparse.labels import largest
from ffnscope.sparse.measures import Truth
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
)
from ffnscope.sparse.predictors.exact import oracle
from ffnscope.types import FFNWeights

# two tokens: ranks of the wanted channels are 1, 3 and 2, 4
SCORES = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
WANTED = torch.tensor([[True, False, True, False], [False, True, False, True]])
MASS = torch.tensor([[6.0, 2.0, 1.0, 1.0], [2.0, 2.0, 4.0, 2.0]])


def chunks() -> Iterable[Scored]:
    """The tokens one by one."""
    for t in range(2):
        row = slice(t, t + 1)
        yield Scored(SCORES[row], Truth(MASS[row], MASS[row], WANTED[row], torch.eye(4)))


def calibrated(policy: Policy, measure: str, value: float) -> tuple[float, float]:
    found = calibrate_policy(policy, chunks, Target(measure, value))
    assert found.n_tokens == 2
    assert found.achieved == pytest.approx(mean_of(policy, chunks, found.parameter, measure)[0])
    return found.parameter, found.achieved


class TestByHand:
    def test_k_for_a_recall_is_a_weighted_quantile_of_ranks(self) -> None:
        # every wanted channel brings a quarter; in order of ranks 1, 2, 3, 4
        assert [calibrated(TopK(), "recall", r) for r in (0.25, 0.26, 0.75, 0.76, 1.0)] == [
            (1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0), (4, 1.0),
        ]  # fmt: skip
        assert calibrated(TopK(), "recall", 0.0) == (1, 0.25)  # no fewer than the first wanted one

    def test_threshold_for_a_recall_is_a_weighted_quantile_of_scores_of_positives(self) -> None:
        assert calibrated(Threshold(), "recall", 0.5) == (3.0, 0.5)
        assert calibrated(Threshold(), "recall", 0.8) == (1.0, 1.0)

    def test_weights_are_one_over_the_wanted_channels_of_a_token(self) -> None:
        wanted = torch.tensor([[True, False, False, False], [False, True, True, True]])

        def uneven() -> Iterable[Scored]:
            yield Scored(SCORES, Truth(MASS, MASS, wanted, torch.eye(4)))

        # 1/2 at rank 1, then 1/6 each at ranks 2, 3, 4
        found = [calibrate_policy(TopK(), uneven, Target("recall", r)).parameter for r in (0.5, 0.66, 0.67, 0.84)]
        assert found == [1, 2, 3, 4]

    def test_tokens_that_want_nothing_have_recall_one(self) -> None:
        wanted = torch.tensor([[True, True, True, True], [False, False, False, False]])

        def sparse() -> Iterable[Scored]:
            yield Scored(SCORES, Truth(MASS, MASS, wanted, torch.eye(4)))

        found = calibrate_policy(TopK(), sparse, Target("recall", 0.75))
        assert (found.parameter, found.achieved) == (2, 0.75)

    def test_nucleus_for_a_recall_is_a_quantile_of_the_mass_before(self) -> None:
        # exclusive mass of the channels: 0, .4, .7, .9
        parameter, achieved = calibrated(Nucleus(), "recall", 0.75)
        assert parameter == pytest.approx(0.7, abs=1e-6)
        assert parameter > 0.7 or torch.tensor(parameter).float() > torch.tensor(0.7)
        assert achieved == 0.75
        assert calibrated(Nucleus(), "recall", 0.25)[0] == pytest.approx(0, abs=1e-6)

    def test_missed_mass(self) -> None:
        # kept mass of the first k channels: (.6 + .2) / 2 = .4, .6, .85, 1
        assert calibrated(TopK(), "missed_mass", 0.6) == (1, pytest.approx(0.6))
        assert calibrated(TopK(), "missed_mass", 0.5) == (2, pytest.approx(0.4))
        assert calibrated(TopK(), "missed_mass", 0.15) == (3, pytest.approx(0.15))
        assert calibrated(TopK(), "missed_mass", 0.1) == (4, pytest.approx(0.0))

    def test_density_is_never_exceeded(self) -> None:
        assert [calibrated(TopK(), "density", d) for d in (1.0, 0.75, 0.74, 0.25, 0.2)] == [
            (4, 1.0), (3, 0.75), (2, 0.5), (1, 0.25), (0, 0.0),
        ]  # fmt: skip
        parameter, achieved = calibrated(Threshold(), "density", 0.6)
        assert 2 < parameter <= 3
        assert achieved == 0.5

    def test_relative_error(self) -> None:
        # W = I, h = MASS: with the first two channels sqrt(2 / 42) and sqrt(20 / 28)
        error = (2 / 42) ** 0.5 / 2 + (20 / 28) ** 0.5 / 2
        assert calibrated(TopK(), "relative_error", error + 1e-6) == (2, pytest.approx(error))
        assert calibrated(TopK(), "relative_error", error - 1e-6)[0] == 3
        assert calibrated(TopK(), "relative_error", 0.0) == (4, 0.0)
        assert calibrated(TopK(), "relative_error", 1.0) == (0, 1.0)


D_MODEL, D_FF = 12, 40


def ffn() -> FFN:
    random = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(D_FF, D_MODEL, generator=random) for _ in range(2))
    return FFN(FFNWeights(gate, up, torch.randn(D_MODEL, D_FF, generator=random)), nn.functional.silu)


class NoisyOracle(nn.Module):
    """Contributions times noise that belongs to the token."""

    def forward(self, x: Tensor) -> Tensor:
        c = ffn().contributions(x)
        rows = [torch.Generator().manual_seed(int(row.abs().sum() * 1e5)) for row in x]
        return c * torch.stack([torch.rand(D_FF, generator=random) for random in rows])


X = torch.randn(64, D_MODEL, generator=torch.Generator().manual_seed(3))
POLICIES: dict[str, Policy] = {
    "top_k": TopK(),
    "threshold": Threshold(),
    "channel_threshold": ChannelThreshold(torch.linspace(0.5, 2, D_FF)),
    "nucleus": Nucleus(),
    "capped_threshold": CappedThreshold(4, 38),
    "statistical_top_k": StatisticalTopK(),
    "bank_top_k": BankTopK(8),
    "hybrid": Hybrid(torch.tensor([1, 2, 30]), Threshold()),
}


@pytest.mark.parametrize("name", list(POLICIES))
class TestLaws:
    @pytest.mark.parametrize(
        ("measure", "values"),
        [
            ("recall", (0.5, 0.8, 0.9)),
            ("missed_mass", (0.4, 0.2, 0.1)),
            ("density", (0.2, 0.4, 0.8)),
            ("relative_error", (0.5, 0.3, 0.15)),
        ],
    )
    def test_met_with_what_is_measured_and_monotone(self, name: str, measure: str, values: tuple[float, ...]) -> None:
        policy, chunks = POLICIES[name], scored(NoisyOracle(), ffn(), X, lambda c: largest(c, 0.3), chunk=20)
        densities = []
        for value in values:
            found = calibrate_policy(policy, chunks, Target(measure, value))
            assert mean_of(policy, chunks, found.parameter, measure)[0] == pytest.approx(found.achieved, abs=1e-9)
            assert found.achieved >= value - 1e-9 if measure == "recall" else found.achieved <= value + 1e-9
            densities.append(mean_of(policy, chunks, found.parameter, "density")[0])
        assert all(a < b for a, b in itertools.pairwise(densities))

    @pytest.mark.parametrize("measure", ["recall", "missed_mass"])
    def test_no_sparser_parameter_meets_the_target(self, name: str, measure: str) -> None:
        policy, chunks = POLICIES[name], scored(NoisyOracle(), ffn(), X, lambda c: largest(c, 0.3))
        found = calibrate_policy(policy, chunks, Target(measure, 0.9 if measure == "recall" else 0.1))
        level = policy.level(found.parameter)
        sparser = policy.natural(float(torch.nextafter(torch.tensor(level), torch.tensor(torch.inf))))
        value = mean_of(policy, chunks, sparser, measure)[0]
        assert value < 0.9 if measure == "recall" else value > 0.1


@pytest.mark.parametrize("name", list(POLICIES))
def test_recall_one_at_density_one(name: str) -> None:
    policy = {**POLICIES, "capped_threshold": CappedThreshold(4, D_FF)}[name]
    chunks = scored(NoisyOracle(), ffn(), X, lambda c: largest(c, 0.3))
    found = calibrate_policy(policy, chunks, Target("density", 1.0))
    assert found.achieved == 1
    assert mean_of(policy, chunks, found.parameter, "recall")[0] == 1
    assert mean_of(policy, chunks, found.parameter, "missed_mass")[0] == 0
    assert calibrate_policy(policy, chunks, Target("relative_error", 0.0)).achieved == 0


def test_chunks_change_nothing() -> None:
    found = {
        size: calibrate_policy(
            Nucleus(), scored(oracle(ffn()), ffn(), X, lambda c: largest(c, 0.2), chunk=size), Target("recall", 0.9)
        )
        for size in (7, 64)
    }
    assert found[7].parameter == pytest.approx(found[64].parameter, rel=1e-5)


def test_a_ceiling_that_makes_a_target_impossible_is_told() -> None:
    with pytest.raises(UsageError, match=r"CappedThreshold cannot reach recall 0\.9: the nearest it comes to is 0\.5"):
        calibrate_policy(CappedThreshold(0, 2), chunks, Target("recall", 0.9))
    with pytest.raises(UsageError, match=r"cannot reach density 0\.1"):
        calibrate_policy(CappedThreshold(2, 3), chunks, Target("density", 0.1))
    with pytest.raises(UsageError, match="cannot reach relative_error"):
        calibrate_policy(CappedThreshold(0, 1), chunks, Target("relative_error", 0.01))
    assert calibrate_policy(CappedThreshold(2, 3), chunks, Target("recall", 0.3)).achieved == 0.5


def test_bad_targets_and_no_tokens() -> None:
    with pytest.raises(UnknownNameError, match="missed_mass"):
        Target("missed", 0.1)
    with pytest.raises(UsageError, match=r"\[0, 1\]"):
        Target("recall", 95)
    for measure in ("recall", "density", "relative_error"):
        with pytest.raises(UsageError, match="no token"):
            calibrate_policy(TopK(), lambda: [], Target(measure, 0.5))
