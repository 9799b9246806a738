"""Exact weighted quantiles of many float32 keys, in bounded memory.

A float32 is ordered like a 32-bit whole number made of its bits. So one pass over the keys adds up weights by the upper
16 bits, which finds the bin of 65,536 that holds the quantile, and a second one by the lower 16 bits within that bin.
Nothing is sorted or kept, whatever the number of tokens and channels, and many quantiles take no more passes than one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnscope.errors import UsageError

_HALF = 1 << 16
_SLACK = 1e-12  # share of the total by which rounding of sums may be off

Weighted = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Makes chunks (keys float32, weights) of equal shapes, the same at every call."""


@dataclass(frozen=True, slots=True)
class Quantile:
    """A level and what is at or above it.

    Attributes:
        level: key.
        weight: sum of the weights of keys at or above the level.
        above: sum of the weights of keys above it.
        total: sum of all weights.
    """

    level: float
    weight: float
    above: float
    total: float


def reach(chunks: Weighted, wanted: Callable[[float], float]) -> Quantile:
    """The highest key such that keys at or above it have at least this weight; else the lowest key there is.

    Two passes over the chunks.

    Args:
        chunks: keys and weights.
        wanted: the weight, from the sum of all weights; called after the first pass.

    Raises:
        UsageError: there is no key.
    """
    return reach_all(chunks, lambda total: [wanted(total)])[0]


def reach_all(chunks: Weighted, wanted: Callable[[float], Sequence[float]]) -> list[Quantile]:
    """The same for several weights, in two passes all the same."""
    upper, counts, total = _tally(chunks)
    if not int(counts.sum()):
        raise UsageError("there is no token to calibrate with; give a text of at least one.")
    weights = [weight - _SLACK * abs(total) for weight in wanted(total)]
    firsts = [_from_above(upper, counts, weight) for weight in weights]
    within = _tally_within(chunks, sorted(set(firsts)))
    places = zip(firsts, weights, strict=True)
    return [_quantile(upper, *within[first], first, weight, total) for first, weight in places]


def _quantile(upper: Tensor, lower: Tensor, counts: Tensor, first: int, weight: float, total: float) -> Quantile:
    before = float(upper[first + 1 :].sum())
    second = _from_above(lower, counts, weight - before)
    above = before + float(lower[second + 1 :].sum())
    return Quantile(float_of(first * _HALF + second), above + float(lower[second]), above, total)


def order_of(keys: Tensor) -> Tensor:
    """Float32 -> int64 in [0, 2^32), in the same order; -0 is 0."""
    bits = (keys.float() + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, ~bits, bits + 2**31)


def float_of(order: int) -> float:
    """The float32 that has this number in `order_of`."""
    bits = order - 2**31 if order >= 2**31 else ~order
    return float(torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32))


def _tally(chunks: Weighted) -> tuple[Tensor, Tensor, float]:
    """Sums of weights and counts of keys by the upper half of the order [2^16], and the sum of all weights."""
    sums, counts = torch.zeros(_HALF, dtype=torch.float64), torch.zeros(_HALF, dtype=torch.int64)
    total = 0.0
    for keys, weights in chunks():
        place, values = order_of(keys).flatten().cpu() // _HALF, weights.double().flatten().cpu()
        sums += torch.bincount(place, values, minlength=_HALF)
        counts += torch.bincount(place, minlength=_HALF)
        total += float(values.sum())
    return sums, counts, total


def _tally_within(chunks: Weighted, uppers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """Upper half -> the same sums and counts by the lower half of the order [2^16], of the keys in that bin."""
    row = torch.full((_HALF,), -1)
    row[list(uppers)] = torch.arange(len(uppers))
    size = len(uppers) * _HALF
    sums, counts = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
    for keys, weights in chunks():
        order = order_of(keys).flatten().cpu()
        of = row[order // _HALF]
        here = of >= 0
        place = of[here] * _HALF + order[here] % _HALF
        sums.index_add_(0, place, weights.double().flatten().cpu()[here])
        counts.index_add_(0, place, torch.ones_like(place))
    return dict(zip(uppers, zip(sums.view(-1, _HALF), counts.view(-1, _HALF), strict=True), strict=True))


def _from_above(sums: Tensor, counts: Tensor, wanted: float) -> int:
    """The highest bin with keys at which the sum from above is at least ``wanted``; else the lowest bin with keys."""
    reached = (sums.flip(0).cumsum(0).flip(0) >= wanted) & (counts > 0)
    bins = (reached if bool(reached.any()) else counts > 0).nonzero().flatten()
    return int(bins[-1] if bool(reached.any()) else bins[0])
