"""How far two score tables agree: rank correlation, and overlap of the channels on top."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.metrics.ranks import average_ranks
from ffnscope.types import Scores

TOP = 0.01


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of two score tables, each number a mean over sites.

    Attributes:
        spearman: Spearman's rank correlation with average ranks for ties; None where every site is constant.
        jaccard: overlap of the top 1 % of channels (at least one per site): shared over either.
    """

    spearman: float | None
    jaccard: float


def agreement(first: Scores, second: Scores, top: float = TOP) -> Agreement:
    """Compare two score tables of the same sites.

    Args:
        first: high = keep.
        second: likewise.
        top: fraction of each site's channels, in (0, 1], whose overlap is the Jaccard index.

    Raises:
        UsageError: the tables are of different sites, or of none; or ``top`` is no such fraction.
    """
    if not 0 < top <= 1:
        raise UsageError(f"top must be in (0, 1], the fraction of channels whose overlap is taken; got {top:g}.")
    if not first.values:
        raise UsageError(f"scores of {first.metric!r} hold no site, so there is nothing to compare.")
    if first.values.keys() != second.values.keys():
        raise UsageError(
            f"scores of {first.metric!r} and {second.metric!r} are of different sites; score the same layers of one "
            "model."
        )
    correlations: list[float] = []
    overlaps: list[float] = []
    for site, a in first.values.items():
        b = second.values[site]
        found = spearman(a, b)
        correlations += [] if found is None else [found]
        overlaps.append(jaccard(a, b, max(1, round(top * site.d_ff))))
    mean = sum(correlations) / len(correlations) if correlations else None
    return Agreement(mean, sum(overlaps) / len(overlaps))


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Spearman's rank correlation of two vectors, ties sharing their average rank; None when one is constant."""
    x, y = average_ranks(a), average_ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))  # exactly |x @ y| where the orders are the same or reversed
    return max(-1.0, min(1.0, float(x @ y) / scale)) if scale > 0 else None


def jaccard(a: Tensor, b: Tensor, size: int) -> float:
    """Overlap of the ``size`` highest entries of two vectors, ties to the lower index: shared over either."""
    tops = [set(torch.sort(v, descending=True, stable=True).indices[:size].tolist()) for v in (a, b)]
    return len(tops[0] & tops[1]) / len(tops[0] | tops[1])
