"""How far two score tables agree: rank correlation, and overlap of the channels on top."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    found = float(rank_correlations([a, b])[0, 1])
    return None if math.isnan(found) else found


def rank_correlations(rows: Sequence[Tensor]) -> Tensor:
    """Spearman's rank correlations of M vectors of one length, ties sharing their average rank.

    Returns:
        [M, M] float64 on the CPU; NaN where one of the two is constant. Exactly 1 or -1 where the orders are the same
        or reversed.
    """
    ranks = torch.stack([average_ranks(row.detach()).cpu() for row in rows])
    ranks = ranks - ranks.mean(1, keepdim=True)
    products = ranks @ ranks.T
    power = products.diagonal()
    scale = torch.outer(power, power).sqrt()
    return torch.where(scale > 0, products / scale, torch.nan).clamp(-1.0, 1.0)


def jaccard(a: Tensor, b: Tensor, size: int) -> float:
    """Overlap of the ``size`` highest entries of two vectors, ties to the lower index: shared over either."""
    tops = [set(torch.sort(v, descending=True, stable=True).indices[:size].tolist()) for v in (a, b)]
    return len(tops[0] & tops[1]) / len(tops[0] | tops[1])
