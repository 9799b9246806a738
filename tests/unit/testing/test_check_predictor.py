"""Predictors that break one law each are caught by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope.errors import ContractError, UsageError
from ffnscope.ffn.function import FFN
from ffnscope.rules import Factory
from ffnscope.sparse.predictors.interface import FitTokens, Predictor
from ffnscope.testing import check_predictor


class Scripted(Predictor):
    """Contributions, changed by a function."""

    scale: Tensor

    def __init__(self, ffn: FFN, change: Callable[[Tensor, Tensor, FFN], Tensor]):
        super().__init__(ffn)
        self.change = change
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.ffn.contributions(x) * self.scale, x, self.ffn)


def rule(change: Callable[[Tensor, Tensor, FFN], Tensor]) -> Factory:
    def make(ffn: FFN, fit: FitTokens | None = None) -> Predictor:
        return Scripted(ffn, change)

    return Factory("scripted", make, "", "")


def test_a_good_one_passes() -> None:
    check_predictor(rule(lambda c, x, ffn: c))


def dirty(c: Tensor, x: Tensor, ffn: FFN) -> Tensor:
    x.mul_(2)
    return c


def draws(c: Tensor, x: Tensor, ffn: FFN) -> Tensor:
    return c + torch.rand(1)


@pytest.mark.parametrize(
    ("law", "change"),
    [
        ("shape", lambda c, x, ffn: c[:, 1:]),
        ("shape", lambda c, x, ffn: c > 0),
        ("finite scores", lambda c, x, ffn: -c),
        ("finite scores", lambda c, x, ffn: c / 0),
        ("purity", dirty),
        ("purity", draws),
        ("tokens alone", lambda c, x, ffn: c / c.sum()),
        ("order of channels", lambda c, x, ffn: c * torch.arange(c.shape[1])),
    ],
)
def test_broken_laws(law: str, change: Any) -> None:
    with pytest.raises(ContractError, match=f"'scripted' breaks the law of {law}"):
        check_predictor(rule(change))


def test_cost() -> None:
    class Free(Scripted):
        bytes_read = -1  # type: ignore[assignment]

    made = Factory("free", lambda ffn, fit: Free(ffn, lambda c, x, ffn: c), "", "")
    with pytest.raises(ContractError, match="law of cost"):
        check_predictor(made)


def test_determinism_and_state() -> None:
    count = iter(range(1, 1000))

    def other_each_time(ffn: FFN, fit: FitTokens | None) -> Predictor:
        made = Scripted(ffn, lambda c, x, ffn: c)
        made.scale.fill_(next(count))
        return made

    with pytest.raises(ContractError, match="law of determinism"):
        check_predictor(Factory("other", other_each_time, "", ""))

    class Stateless(Scripted):
        def __init__(self, ffn: FFN):
            super().__init__(ffn, lambda c, x, ffn: c)
            self.kept: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.kept is None:
                self.kept = self.scale.clone()
            return self.ffn.contributions(x) * self.kept

    with pytest.raises(ContractError, match="law of state"):
        check_predictor(Factory("stateless", lambda ffn, fit: Stateless(ffn), "", ""))


def test_types_and_refusals() -> None:
    with pytest.raises(ContractError, match="law of type"):
        check_predictor(Factory("none", lambda ffn, fit: None, "", ""))

    def refuses(ffn: FFN, fit: FitTokens | None) -> Predictor:
        raise UsageError("no")

    with pytest.raises(ContractError, match="law of gated FFNs"):
        check_predictor(Factory("refuses", refuses, "", ""))
