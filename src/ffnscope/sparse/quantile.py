"""Exact weighted quantiles of many float32 keys, in bounded memory.

A float32 is ordered like a 32-bit whole number made of its bits. So one pass over the keys adds up weights by the upper
16 bits, which finds the bin of 65,536 that holds the quantile, and a second one by the lower 16 bits within that bin.
Nothing is sorted or kept, whatever the number of tokens and channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    upper, counts, total = _tally(chunks, None)
    if not int(counts.sum()):
        raise UsageError("there is no token to calibrate with; give a text of at least one.")
    weight = wanted(total) - _SLACK * abs(total)
    first = _from_above(upper, counts, weight)
    lower, counts, _ = _tally(chunks, first)
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


def _tally(chunks: Weighted, upper: int | None) -> tuple[Tensor, Tensor, float]:
    """Sums of weights and counts of keys by the upper half of the order; or by the lower one where it is ``upper``."""
    sums, counts = torch.zeros(_HALF, dtype=torch.float64), torch.zeros(_HALF, dtype=torch.int64)
    total = 0.0
    for keys, weights in chunks():
        order, values = order_of(keys).flatten().cpu(), weights.double().flatten().cpu()
        place = order // _HALF
        if upper is not None:
            here = place == upper
            place, values = (order % _HALF)[here], values[here]
        sums += torch.bincount(place, values, minlength=_HALF)
        counts += torch.bincount(place, minlength=_HALF)
        total += float(values.sum())
    return sums, counts, total


def _from_above(sums: Tensor, counts: Tensor, wanted: float) -> int:
    """The highest bin with keys at which the sum from above is at least ``wanted``; else the lowest bin with keys."""
    reached = (sums.flip(0).cumsum(0).flip(0) >= wanted) & (counts > 0)
    bins = (reached if bool(reached.any()) else counts > 0).nonzero().flatten()
    return int(bins[-1] if bool(reached.any()) else bins[0])
