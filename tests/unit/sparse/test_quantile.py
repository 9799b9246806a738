"""Exact weighted quantiles against sorting."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.sparse.quantile import float_of, order_of, reach, reach_all


def test_order_is_that_of_the_numbers() -> None:
    values = torch.tensor([-math.inf, -3e38, -2.0, -1.0, -1e-45, 0.0, 1e-45, 1.0, 1.0000001, 3e38, math.inf])
    order = order_of(values)
    assert bool((order.diff() > 0).all())
    assert int(order.min()) >= 0
    assert int(order.max()) < 2**32
    assert [float_of(int(o)) for o in order] == values.tolist()
    assert int(order_of(torch.tensor(-0.0))) == int(order_of(torch.tensor(0.0)))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["spread", "close", "ties"])
def test_against_sorting(share: float, kind: str) -> None:
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(5, 40, generator=random)
    keys = {"spread": keys, "close": 1 + keys * 1e-6, "ties": keys.round()}[kind]
    weights = torch.rand(5, 40, generator=random, dtype=torch.float64)

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        yield keys[:2], weights[:2]
        yield keys[2:], weights[2:]

    found = reach(chunks, lambda total: share * total)
    ordered = keys.flatten().unique().flip(0)
    sums = torch.stack([weights[keys >= key].sum() for key in ordered])
    place = int((sums >= share * weights.sum() * (1 - 1e-12)).nonzero()[0])
    assert found.level == float(ordered[place])
    assert found.weight == pytest.approx(float(sums[place]))
    assert found.above == pytest.approx(float(weights[keys > ordered[place]].sum()))
    assert found.total == pytest.approx(float(weights.sum()))


def test_nothing_to_calibrate_with() -> None:
    with pytest.raises(UsageError, match="no token"):
        reach(lambda: [], lambda total: total)


def test_many_take_two_passes_and_are_what_each_is_alone() -> None:
    keys = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    weights, passes = torch.rand(40, 30, generator=torch.Generator().manual_seed(1)), [0]
    shares = (0.9, 0.01, 0.5, 0.5, 1.0, 0.02)

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        passes[0] += 1
        yield keys[:7], weights[:7]
        yield keys[7:], weights[7:]

    found = reach_all(chunks, lambda total: [share * total for share in shares])
    assert passes == [2]
    assert found == [reach(chunks, lambda total, share=share: share * total) for share in shares]  # type: ignore[misc]
