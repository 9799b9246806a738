"""Certificates by hand, and how often they fail over many draws of documents."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.sparse.certificate import (
    Certificate,
    binomial_below,
    bootstrap,
    hoeffding_bentkus,
    learn_then_test,
    needed_documents,
    risk_control,
    split_conformal,
)

SPLITS = 300


class TestByHand:
    def test_risk_control_adds_one_document_with_the_worst_loss(self) -> None:
        losses = torch.tensor([[0.0, 0.1, 0.2, 0.6]], dtype=torch.float64).expand(4, 4)
        # bounds 4/5 mean + 1/5: 0.2, 0.28, 0.36, 0.68
        settings = [risk_control(losses, limit).setting for limit in (0.2, 0.27, 0.28, 0.36, 0.67, 0.68)]
        assert settings == [0, 0, 1, 2, 2, 3]
        found = risk_control(losses, 0.36)
        assert found == Certificate("risk_control", 0.36, 0.0, 2, 4, pytest.approx(0.2))
        assert found.statement.startswith("the expected loss of a new document is at most 0.36")

    def test_a_loss_that_falls_again_counts_as_the_largest_before(self) -> None:
        losses = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
        # means of the largest so far: 0, 1/6, 1/3 -> bounds 1/4, 3/8, 1/2
        assert risk_control(losses, 0.49).setting == 1
        assert risk_control(losses, 0.5).setting == 2

    def test_split_conformal_takes_a_rank_of_needed_settings(self) -> None:
        # document j needs setting j or safer: its loss is 0 up to there
        losses = (torch.arange(5)[None] > torch.arange(4)[:, None]).float()
        # ceil(5 (1 - failure)) of the needed settings 3, 2, 1, 0, from aggressive to safe
        assert [split_conformal(losses, 0.5, f).setting for f in (0.2, 0.3, 0.4, 0.6, 0.8)] == [0, 0, 1, 2, 3]

    def test_learn_then_test_stops_at_the_first_that_is_not_rejected(self) -> None:
        losses = torch.zeros(50, 4)
        losses[:, 1], losses[:, 2] = 0.01, 0.2
        assert [hoeffding_bentkus(row, 0.1) <= 0.1 for row in losses.T] == [True, True, False, True]
        found = learn_then_test(losses, 0.1, 0.1)
        assert (found.setting, found.failure, found.loss) == (1, 0.1, pytest.approx(0.01))

    def test_hoeffding_bentkus(self) -> None:
        assert hoeffding_bentkus(torch.zeros(10), 0.2) == pytest.approx(0.8**10)
        assert hoeffding_bentkus(torch.ones(10), 0.2) == 1
        # mean 0.1 of ten: exp(-10 kl(0.1, 0.5)) is larger than e P(Bin(10, 0.5) <= 1) = e 11 / 1024
        mean = torch.tensor([1.0] + [0.0] * 9)
        kl = 0.1 * math.log(0.2) + 0.9 * math.log(1.8)
        assert hoeffding_bentkus(mean, 0.5) == pytest.approx(min(math.exp(-10 * kl), math.e * 11 / 1024))

    def test_binomial(self) -> None:
        assert binomial_below(1, 3, 0.5) == pytest.approx(0.5)
        assert binomial_below(3, 3, 0.3) == pytest.approx(1)

    def test_bootstrap_agrees_with_the_normal_for_many_documents(self) -> None:
        losses = torch.rand(400, generator=torch.Generator().manual_seed(1)) * 0.2
        limit = float(losses.mean()) + 1.645 * float(losses.std()) / 20
        assert bootstrap(losses, limit) == pytest.approx(0.05, abs=0.02)
        assert bootstrap(losses, float(losses.mean())) == pytest.approx(0.5, abs=0.05)


class TestHowManyDocuments:
    def test_needed(self) -> None:
        assert needed_documents("risk_control", 0.05) == 19
        assert needed_documents("split_conformal", 0.3, 0.1) == 9
        assert needed_documents("learn_then_test", 0.1, 0.1) == 22  # 0.9^22 = 0.098

    @pytest.mark.parametrize("n", [18, 19])
    def test_risk_control_at_the_border(self, n: int) -> None:
        losses = torch.zeros(n, 2)
        if n == 19:
            assert risk_control(losses, 0.05).setting == 1
        else:
            with pytest.raises(UsageError, match=r"needs at least 19 calibration documents; there are 18\. Trace more"):
                risk_control(losses, 0.05)

    def test_the_others_refuse_too(self) -> None:
        with pytest.raises(UsageError, match=r"split_conformal .* failure of 0.1 needs at least 9"):
            split_conformal(torch.zeros(8, 2), 0.5, 0.1)
        assert split_conformal(torch.zeros(9, 2), 0.5, 0.1).setting == 1
        with pytest.raises(UsageError, match=r"learn_then_test .* needs at least 22"):
            learn_then_test(torch.zeros(21, 2), 0.1, 0.1)
        assert learn_then_test(torch.zeros(22, 2), 0.1, 0.1).setting == 1
        with pytest.raises(UsageError, match=r"needs at least 50 calibration documents; there are 49"):
            learn_then_test(torch.zeros(49, 2), 0.1, 0.1, bootstrap)
        assert learn_then_test(torch.zeros(50, 2), 0.1, 0.1, bootstrap).setting == 1

    def test_impossible_losses(self) -> None:
        with pytest.raises(UsageError, match=r"must be in \[0, 1\]; got \[0, 2\]"):
            risk_control(torch.tensor([[0.0, 2.0]] * 30), 0.1)
        with pytest.raises(NonFiniteError, match="NaN"):
            risk_control(torch.full((30, 2), torch.nan), 0.1)
        with pytest.raises(UsageError, match=r"limit of a certificate must be in \(0, 1\); got 1"):
            risk_control(torch.zeros(3, 2), 1.0)
        with pytest.raises(UsageError, match="not even the first"):
            risk_control(torch.ones(30, 2), 0.1)


def population(n: int, seed: int) -> Tensor:
    """Losses [n, 41] of documents that differ: document j has the loss min(1, hardness_j setting^2)."""
    random = torch.Generator().manual_seed(seed)
    hardness = torch.randn(n, generator=random, dtype=torch.float64).mul(0.8).exp()
    return (hardness[:, None] * torch.linspace(0, 1, 41, dtype=torch.float64)[None].square()).clamp_max(1)


class TestCoverage:
    """Documents drawn again and again: promises must hold as often as they say, and not be empty."""

    def draws(self, n: int) -> list[tuple[Tensor, Tensor]]:
        """Calibration and new documents of every split."""
        return [(population(n, 2 * i), population(200, 2 * i + 1)) for i in range(SPLITS)]

    def test_risk_control(self) -> None:
        limit = 0.1
        found = [(risk_control(c, limit).setting, new) for c, new in self.draws(30)]
        losses = torch.tensor([float(new[:, setting].mean()) for setting, new in found])
        assert float(losses.mean()) <= limit + 2 * float(losses.std()) / SPLITS**0.5
        assert float(losses.mean()) > 0.5 * limit

    def test_split_conformal(self) -> None:
        limit, failure = 0.2, 0.1
        found = [(split_conformal(c, limit, failure).setting, new) for c, new in self.draws(40)]
        above = torch.tensor([float((new[:, setting] > limit).double().mean()) for setting, new in found])
        assert float(above.mean()) <= failure + 2 * float(above.std()) / SPLITS**0.5
        assert float(above.mean()) > 0.5 * failure

    def test_learn_then_test(self) -> None:
        limit, failure = 0.1, 0.1
        risk = population(200_000, -1 % 2**31).mean(0)
        settings = [learn_then_test(c, limit, failure).setting for c, _ in self.draws(60)]
        wrong = sum(float(risk[setting]) > limit for setting in settings) / SPLITS
        assert wrong <= failure + 2 * (failure * (1 - failure) / SPLITS) ** 0.5
        assert sum(setting >= 4 for setting in settings) / SPLITS > 0.9

    def test_learn_then_test_by_bootstrap(self) -> None:
        limit, failure, splits = 0.1, 0.1, 200
        risk = population(200_000, -1 % 2**31).mean(0)
        drawn = [population(50, 2 * i) for i in range(splits)]
        settings = [learn_then_test(c, limit, failure, bootstrap).setting for c in drawn]
        wrong = sum(float(risk[setting]) > limit for setting in settings) / splits
        assert wrong <= failure + 2 * (failure * (1 - failure) / splits) ** 0.5
        careful = [learn_then_test(c, limit, failure).setting for c in drawn]
        assert sum(careful) < 0.7 * sum(settings)

    def test_the_plain_mean_breaks_the_promise(self) -> None:
        limit = 0.1
        found = [(int((c.mean(0) <= limit).nonzero().max()), new) for c, new in self.draws(30)]
        above = [float(new[:, setting].mean()) > limit for setting, new in found]
        corrected = [float(new[:, risk_control(c, limit).setting].mean()) > limit for c, new in self.draws(30)]
        assert sum(corrected) < 0.7 * sum(above)
