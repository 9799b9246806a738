"""Null distributions: matched random sets of channels, p-values of draws, and their correction for many FFNs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ffnscope.errors import UsageError

LEAST_DRAWS = 200
SIGNIFICANT = 0.05
BINS = 10
Tail = Literal["upper", "lower"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A number against its null distribution.

    Attributes:
        value: the number.
        mean: of the null draws.
        sd: of the null draws; 0 when they are all alike.
        low: 2.5 % quantile of the draws.
        high: 97.5 % quantile.
        draws: number of draws.
        p: (1 + draws at least as extreme) / (1 + draws), one-sided.
        tail: which side counts as extreme.
    """

    value: float
    mean: float
    sd: float
    low: float
    high: float
    draws: int
    p: float
    tail: Tail = "upper"

    @property
    def effect(self) -> float | None:
        """(value - mean) / sd; None where the draws are all alike."""
        return (self.value - self.mean) / self.sd if self.sd > 0 else None

    def row(self) -> dict[str, Any]:
        """Flat columns, without the corrected p-value."""
        return {
            "value": self.value,
            "null_mean": self.mean,
            "null_sd": self.sd,
            "null_low": self.low,
            "null_high": self.high,
            "draws": self.draws,
            "effect": self.effect,
            "tail": self.tail,
            "p": self.p,
        }


def compare(value: float, drawn: Tensor, tail: Tail = "upper") -> Comparison:
    """Compare a number with draws [n] of a null."""
    drawn = drawn.double()
    count = int((drawn >= value).sum() if tail == "upper" else (drawn <= value).sum())
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    sd = float(drawn.std(correction=0))
    n = drawn.numel()
    return Comparison(value, float(drawn.mean()), sd, low, high, n, (1 + count) / (1 + n), tail)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979: family-wise error, any dependence), in the same order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    found = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - rank)))
        found[index] = highest
    return found


def enough_draws(n_sites: int) -> int:
    """Fewest draws by which one of ``n_sites`` FFNs can differ from its null at 0.05 after Holm's correction."""
    return max(LEAST_DRAWS, math.ceil(n_sites / SIGNIFICANT))


def check_draws(draws: int) -> None:
    """Raise UsageError for fewer draws than a p-value of 0.005 needs."""
    if draws < LEAST_DRAWS:
        raise UsageError(f"draws must be at least {LEAST_DRAWS}, for p-values down to 0.005; got {draws}.")


def random_sets(size: int, n: int, draws: int, random: torch.Generator) -> Tensor:
    """Sets of ``size`` different numbers below ``n``; [draws, size].

    Raises:
        UsageError: there are fewer than ``size`` numbers.
    """
    if size > n:
        raise UsageError(f"cannot draw {size} channels of {n}; make the core or the halo smaller, or the pool larger.")
    return torch.rand(draws, n, generator=random).topk(size, dim=1).indices


def matched_sets(targets: Tensor, candidates: Tensor, draws: int, random: torch.Generator) -> Tensor:
    """Random sets of candidates that are spread over quantile bins as the targets are.

    The candidates are cut into 10 bins of equal numbers by their values. From each bin as many are drawn, without
    replacement, as there are targets in it. A bin with fewer than twice as many candidates as targets is joined with
    its neighbour below (above, for the lowest), so that draws differ; matching is coarser there.

    Args:
        targets: values [k] to be matched.
        candidates: values [n] of the channels to draw from.
        draws: number of sets.
        random: source of randomness.

    Returns:
        Places among the candidates, [draws, k].

    Raises:
        UsageError: fewer candidates than targets.
    """
    if targets.numel() > candidates.numel():
        random_sets(targets.numel(), candidates.numel(), 1, random)
    order = candidates.argsort(stable=True)
    found: list[Tensor] = []
    for members, count in _bins(targets, candidates[order]):
        places = random_sets(count, members.stop - members.start, draws, random) + members.start
        found.append(order[places])
    return torch.cat(found, dim=1)


def _bins(targets: Tensor, ordered: Tensor) -> list[tuple[slice, int]]:
    """Runs of the sorted candidates, the highest first, and how many targets are matched in each."""
    n, k = ordered.numel(), targets.numel()
    edges = [round(i * n / BINS) for i in range(BINS + 1)]
    bounds = torch.stack([ordered[min(e, n - 1)] for e in edges[1:-1]])
    counts = torch.bincount(torch.bucketize(targets, bounds, right=True), minlength=BINS).tolist()
    found: list[tuple[slice, int]] = []
    stop, wanted = n, 0
    for i in reversed(range(BINS)):
        wanted += counts[i]
        if stop - edges[i] >= 2 * wanted and wanted:
            found.append((slice(edges[i], stop), wanted))
        if stop - edges[i] >= 2 * wanted:
            stop, wanted = edges[i], 0
    if wanted:  # the lowest bins cannot hold their own: everything from there up is one bin
        while found and stop < 2 * wanted:
            members, count = found.pop()
            stop, wanted = members.stop, wanted + count
        found.append((slice(0, stop if stop >= wanted else n), wanted))
    assert sum(count for _, count in found) == k
    return found
