"""Measures of a selection by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ffnscope.errors import UsageError
from ffnscope.ffn.function import FFN
from ffnscope.sparse.labels import largest, nonzero, top_mass
from ffnscope.sparse.measures import (
    MEASURES,
    density,
    measure,
    missed_mass,
    precision,
    recall,
    relative_error,
    summarise,
)
from ffnscope.sparse.policies import Nucleus, TopK
from ffnscope.sparse.predictors.exact import exact_gate, oracle
from ffnscope.sparse.predictors.fixed import random as chance
from ffnscope.sparse.predictors.interface import FitTokens
from ffnscope.sparse.predictors.low_bit import low_bit
from ffnscope.sparse.selector import Selector
from ffnscope.types import FFNWeights

MASK = torch.tensor([[True, True, False, False], [False, False, False, False]])
WANTED = torch.tensor([[True, False, True, True], [False, False, False, False]])


def test_by_hand() -> None:
    assert density(MASK).tolist() == [0.5, 0.0]
    assert recall(MASK, WANTED).tolist() == [pytest.approx(1 / 3), 1.0]
    assert precision(MASK, WANTED).tolist() == [0.5, 1.0]
    mass = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    assert missed_mass(MASK, mass).tolist() == [0.7, 0.0]


def test_relative_error_by_hand() -> None:
    down = torch.tensor([[1.0, 0.0, 3.0], [0.0, 2.0, 0.0]])
    h = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, False, True]] * 2)  # what is lost is (0, 2) of (4, 2)
    assert relative_error(mask, h, down).tolist() == [pytest.approx(2 / 20**0.5), 0.0]


def test_opposite_contributions_can_make_the_error_smaller_than_the_mass() -> None:
    down = torch.tensor([[1.0, -1.0, 1.0]])
    h, mask = torch.ones(1, 3), torch.tensor([[False, False, True]])
    assert float(relative_error(mask, h, down)) == 0
    assert float(missed_mass(mask, h)) == pytest.approx(2 / 3)


def test_labels_by_hand() -> None:
    c = torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.0, 0.0, 5.0, 0.0]])
    assert top_mass(c, 0.3).tolist() == [[True, False, True, False], [False, False, True, False]]
    assert top_mass(c, 0.29).tolist()[0] == [True, False, True, True]
    assert largest(c, 0.5).tolist()[0] == [True, False, True, False]
    assert nonzero(c).tolist() == [[True] * 4, [False, False, True, False]]
    for bad in (0.0, 1.0, 30):
        with pytest.raises(UsageError, match="nonzero"):
            top_mass(c, bad)
    with pytest.raises(UsageError, match=r"\[0, 1\]"):
        largest(c, 30)


def test_summaries_are_values_that_occur() -> None:
    found = summarise(torch.arange(1, 41))
    assert (found.mean, found.p5, found.p95) == (20.5, 2.0, 38.0)
    assert summarise(torch.tensor([3.0])).p5 == 3.0


def ffn(dtype: torch.dtype = torch.float64) -> FFN:
    random = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(40, 12, generator=random, dtype=dtype) for _ in range(2))
    return FFN(FFNWeights(gate, up, torch.randn(12, 40, generator=random, dtype=dtype)), nn.functional.silu)


X = torch.randn(50, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def wanted(c: Tensor) -> Tensor:
    return largest(c, 0.3)


class TestMeasure:
    def test_everything_kept_loses_nothing(self) -> None:
        found = measure(ffn(), lambda x: torch.ones(len(x), 40, dtype=torch.bool), X, wanted).summary()
        assert (found["recall"].mean, found["density"].mean) == (1, 1)
        assert (found["missed_mass"].mean, found["relative_error"].mean) == (0, 0)
        assert found["precision"].mean == pytest.approx(0.3)

    def test_nothing_kept_loses_everything(self) -> None:
        found = measure(ffn(), lambda x: torch.zeros(len(x), 40, dtype=torch.bool), X, wanted).summary()
        assert (found["recall"].mean, found["missed_mass"].mean) == (0, 1)
        assert found["relative_error"].mean == pytest.approx(1)

    def test_the_oracle_has_recall_one_at_the_density_of_the_labels(self) -> None:
        found = measure(ffn(), lambda x: TopK().select(oracle(ffn())(x), 12), X, wanted).summary()
        assert found["recall"].mean == found["precision"].mean == 1

    def test_chunks_change_nothing(self) -> None:
        def select(x: Tensor) -> Tensor:
            return Nucleus().select(oracle(ffn())(x), 0.8)

        found, parts = measure(ffn(), select, X, wanted), measure(ffn(), select, X, wanted, chunk=7)
        assert all(torch.allclose(found.values[name], parts.values[name]) for name in MEASURES)

    def test_a_selector(self) -> None:
        one = Selector(oracle(ffn()), TopK(), 12)
        assert torch.equal(one(X), wanted(ffn().contributions(X)))
        assert measure(ffn(), one, X, wanted).summary()["recall"].mean == 1

    def test_by_document(self) -> None:
        found = measure(ffn(), lambda x: TopK().select(oracle(ffn())(x), 6), X, wanted)
        document = torch.tensor([7] * 20 + [3] * 30)
        means = found.by_document(document)["missed_mass"]
        values = found.values["missed_mass"]
        assert means.tolist() == [pytest.approx(float(values[20:].mean())), pytest.approx(float(values[:20].mean()))]

    def test_no_token(self) -> None:
        with pytest.raises(UsageError, match="no token"):
            measure(ffn(), lambda x: x > 0, X[:0], wanted)


@pytest.mark.parametrize("k", [1, 8, 20, 39])
@pytest.mark.parametrize("name", ["exact_gate", "low_bit", "random", "abs_h"])
def test_no_predictor_misses_less_than_the_oracle_at_the_same_density(name: str, k: int) -> None:
    one = ffn()
    made = {
        "exact_gate": lambda: exact_gate(one, FitTokens(X)),
        "low_bit": lambda: low_bit(one, bits=3, group=4),
        "random": lambda: chance(one),
        "abs_h": lambda: oracle(one, norm=False),
    }[name]()
    best = measure(one, lambda x: TopK().select(oracle(one)(x), k), X, wanted).values["missed_mass"]
    other = measure(one, lambda x: TopK().select(made(x), k), X, wanted).values["missed_mass"]
    assert bool((best <= other + 1e-12).all())
    assert float(best.mean()) < float(other.mean())
