"""Predictors from files: of another shape, and of another package."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ffnscope.errors import ArtifactError, UsageError
from ffnscope.ffn.function import FFN
from ffnscope.registry import PREDICTORS, predictor
from ffnscope.sparse.predictors.exact import oracle
from ffnscope.sparse.predictors.interface import FitTokens, Predictor
from ffnscope.sparse.predictors.restore import restore_predictor
from ffnscope.types import FFNWeights


def ffn(d_ff: int = 6) -> FFN:
    random = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(d_ff, 4, generator=random) for _ in range(2))
    return FFN(FFNWeights(gate, up, torch.randn(4, d_ff, generator=random)), torch.nn.functional.silu)


class Mean(Predictor):
    mean: Tensor

    def __init__(self, ffn: FFN, mean: Tensor):
        super().__init__(ffn)
        self.register_buffer("mean", mean)

    def forward(self, x: Tensor) -> Tensor:
        return self.mean.expand(len(x), -1)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    PREDICTORS.names()
    monkeypatch.setattr(PREDICTORS, "_items", dict(PREDICTORS._items))

    @predictor("own_mean")
    def own_mean(ffn: FFN, fit: FitTokens | None, *, scale: float = 1.0) -> Predictor:
        """Means."""
        mean = torch.zeros(ffn.d_ff) if fit is None else ffn.contributions(fit.x).mean(0) * scale
        return Mean(ffn, mean)

    @predictor("own_strict")
    def own_strict(ffn: FFN, fit: FitTokens | None) -> Predictor:
        """Means, of tokens only."""
        if fit is None:
            raise UsageError("give tokens.")
        return Mean(ffn, ffn.contributions(fit.x).mean(0))


@pytest.mark.usefixtures("own")
def test_a_predictor_of_another_package() -> None:
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    made = PREDICTORS.get("own_mean").make(ffn(), FitTokens(x), scale=2.0)
    found = restore_predictor("own_mean", ffn(), {"scale": 2.0}, made.state_dict())
    assert torch.equal(found(x), made(x))
    assert not found.training


@pytest.mark.usefixtures("own")
def test_one_that_needs_tokens_says_what_to_do() -> None:
    with pytest.raises(UsageError, match="'own_strict' cannot be made again from a file"):
        restore_predictor("own_strict", ffn(), {}, {"mean": torch.zeros(6)})


def test_tensors_of_another_ffn() -> None:
    with pytest.raises(ArtifactError, match=r"the tensors of predictor 'oracle' for the FFN are .*\(8,\).*expected"):
        restore_predictor("oracle", ffn(), {}, oracle(ffn(8)).state_dict())


def test_the_dtype_of_the_file_stays() -> None:
    state = {"fc1.weight": torch.ones(2, 4, dtype=torch.bfloat16), "fc2.weight": torch.ones(6, 2, dtype=torch.bfloat16)}
    found = restore_predictor("low_rank", ffn(), {"rank": 2}, state)
    assert {value.dtype for value in found.state_dict().values()} == {torch.bfloat16}
