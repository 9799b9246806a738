"""Shares, Gini, participation, tails: hand-computed values and laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ffnscope.metrics.concentration import (
    SHAPES,
    effective_number,
    lorenz,
    spread_shape,
    tail_exponents,
    tail_fit,
    top_count,
)


def shape(values: Tensor) -> dict[str, float]:
    return dict(zip(SHAPES, spread_shape(values).tolist(), strict=True))


def pareto(n: int, exponent: float, seed: int = 0) -> Tensor:
    u = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1 - u) ** (-1 / (exponent - 1))


def test_equal_values_are_spread_evenly():
    found = shape(torch.full((200,), 3.0))
    assert found == pytest.approx({"top1": 0.01, "top5": 0.05, "top10": 0.1, "gini": 0.0, "participation": 1.0})


def test_one_channel_holds_all():
    values = torch.zeros(50)
    values[7] = 2.0
    assert shape(values) == pytest.approx({"top1": 1, "top5": 1, "top10": 1, "gini": 49 / 50, "participation": 1 / 50})


def test_values_by_hand():
    found = shape(torch.tensor([1.0, 4.0, 3.0, 2.0]))
    assert found["top1"] == pytest.approx(0.4)  # at least one channel
    # Gini from all pairs: sum |a - b| / (2 n sum)
    pairs = sum(abs(a - b) for a in (1, 2, 3, 4) for b in (1, 2, 3, 4))
    assert found["gini"] == pytest.approx(pairs / (2 * 4 * 10))
    assert found["participation"] == pytest.approx(100 / 30 / 4)
    assert lorenz(torch.tensor([1.0, 4.0, 3.0, 2.0]), [0, 0.25, 0.5, 0.625, 1]) == pytest.approx([0, 0.4, 0.7, 0.8, 1])


@pytest.mark.parametrize(
    ("fraction", "n", "count"), [(0.01, 1536, 15), (0.01, 14336, 143), (0.01, 20, 1), (0.1, 48, 5)]
)
def test_top_counts_round(fraction: float, n: int, count: int):
    assert top_count(fraction, n) == count


def test_scale_and_order_do_not_matter():
    values = pareto(300, 2.2)
    expected = spread_shape(values)
    for other in (values.flip(0), 1e-30 * values, 1e12 * values):
        assert torch.allclose(spread_shape(other), expected, rtol=1e-9)
        assert tail_fit(other).exponent == pytest.approx(tail_fit(values).exponent, rel=1e-6)


def test_rows_are_taken_alone_and_nothing_is_not_a_number():
    rows = torch.stack([torch.arange(1.0, 9.0), torch.ones(8), torch.zeros(8)])
    found = spread_shape(rows)
    assert torch.allclose(found[0], spread_shape(rows[0])) and torch.allclose(found[1], spread_shape(rows[1]))
    assert bool(found[2].isnan().all())


@pytest.mark.parametrize("exponent", [1.8, 2.5, 3.5])
def test_a_power_law_is_found(exponent: float):
    found = tail_fit(pareto(4000, exponent))
    assert found.exponent == pytest.approx(exponent, abs=4 * (exponent - 1) / math.sqrt(found.count))
    assert found.count > 1000


def test_the_threshold_leaves_out_what_follows_no_power_law():
    """Below 1 the values are uniform, above a power law: Clauset's distance finds the border."""
    values = torch.cat([torch.linspace(0.01, 1, 3000, dtype=torch.float64), pareto(3000, 2.5)])
    found = tail_fit(values)
    assert 0.7 < found.smallest < 1.6
    assert found.exponent == pytest.approx(2.5, abs=0.15)
    assert found.count == int((values >= found.smallest).sum())


def test_the_exponent_is_hills_estimate():
    values = pareto(100, 2.0)
    top = values.sort(descending=True).values[:20].log()
    expected = 1 + 1 / float((top - top[-1]).mean())
    assert tail_exponents(values[None], 20).tolist() == pytest.approx([expected])
    found = tail_fit(values)
    assert float(tail_exponents(values, found.count)) == pytest.approx(found.exponent)


@pytest.mark.parametrize(
    "values", [torch.ones(50), torch.arange(1.0, 9.0), torch.zeros(30)], ids=["equal", "few", "none"]
)
def test_no_tail(values: Tensor):
    assert tail_fit(values) is None


def test_effective_number():
    rows = torch.stack([torch.ones(6), torch.tensor([1.0, 1, 0, 0, 0, 0])])
    assert effective_number(rows).tolist() == pytest.approx([6, 2])
    assert effective_number(torch.zeros(2, 6)).tolist() == [0, 0]
