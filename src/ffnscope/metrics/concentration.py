"""How unevenly a non-negative quantity is spread over channels: top shares, Lorenz, Gini, participation, tail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOPS = (0.01, 0.05, 0.1)
SHAPES: tuple[str, ...] = ("top1", "top5", "top10", "gini", "participation")
LEAST = 10  # channels that a tail is fitted to, at least
STARTS = 100  # thresholds that are tried


@dataclass(frozen=True, slots=True)
class Tail:
    """A power law p(x) ~ x^-exponent for x >= ``smallest``, and how many channels lie there."""

    exponent: float
    smallest: float
    count: int


def spread_shape(values: Tensor) -> Tensor:
    """The numbers named in ``SHAPES``, from one sort; [..., n] -> [..., 5], NaN where the values sum to 0.

    * top1, top5, top10: share of the sum that the top 1, 5, 10 % of channels hold (rounded to a count, at least 1).
    * gini: Gini coefficient, 0 = equal, (n - 1) / n = all in one channel.
    * participation: (sum s)^2 / sum s^2 / n, the effective share of channels, 1 = equal, 1 / n = all in one.
    """
    ordered = values.double().sort(dim=-1, descending=True).values
    n, total = ordered.shape[-1], ordered.sum(-1)
    held = ordered.cumsum(-1) / total[..., None]
    tops = [held[..., top_count(fraction, n) - 1] for fraction in TOPS]
    gini = (2 * held.sum(-1) - (n + 1)) / n
    scaled = ordered / total[..., None]  # squares of tiny values would vanish
    participation = 1 / (scaled.square().sum(-1) * n)
    found = torch.stack([*tops, gini, participation], -1)
    return torch.where((total > 0)[..., None], found, torch.nan)


def top_count(fraction: float, n: int) -> int:
    """Channels that the top ``fraction`` of ``n`` is: rounded to the nearest, at least 1."""
    return max(1, round(fraction * n))


def lorenz(values: Tensor, fractions: Sequence[float]) -> list[float]:
    """Share of the sum that the top ``fractions`` of channels hold, linear between whole channels."""
    ordered = values.double().sort(descending=True).values
    held = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)]) / ordered.sum()
    place = torch.tensor(list(fractions), dtype=torch.float64) * ordered.numel()
    low = place.floor().long().clamp(0, ordered.numel() - 1)
    part = place - low
    return (held[low] * (1 - part) + held[low + 1] * part).tolist()


def tail_fit(values: Tensor) -> Tail | None:
    """Fit a power law to the largest values; None with fewer than 10 positive values, or where these are all equal.

    The exponent is the maximum-likelihood one for continuous values (Hill's estimate plus 1); the threshold is the one
    of 100 (spaced evenly in the logarithm of the number of channels above) with the smallest Kolmogorov-Smirnov
    distance between data and fit, after Clauset, Shalizi and Newman, «Power-law distributions in empirical data», 2009.
    Small values are left out by the threshold; that a power law fits at all is not tested.
    """
    logs = values[values > 0].double().sort(descending=True).values.log()
    if logs.numel() < LEAST:
        return None
    grid = torch.logspace(math.log10(LEAST), math.log10(logs.numel()), STARTS, dtype=torch.float64)
    best: tuple[float, Tail] | None = None
    for start in grid.round().long().clamp_max(logs.numel()).unique().tolist():
        count = int((logs >= logs[start - 1]).sum())
        above = logs[:count] - logs[count - 1]
        mean = float(above.mean())
        if mean <= 0:
            continue
        beyond = torch.exp(-above / mean)  # share of the fitted law beyond each value
        rank = torch.arange(count, dtype=torch.float64)
        distance = float(torch.maximum((beyond - rank / count).abs(), (beyond - (rank + 1) / count).abs()).max())
        if best is None or distance < best[0]:
            best = distance, Tail(1 + 1 / mean, float(logs[count - 1].exp()), count)
    return None if best is None else best[1]


def tail_exponents(values: Tensor, count: int) -> Tensor:
    """Exponent of the ``count`` largest values of each row; [..., n] -> [...]. NaN where it is not defined."""
    logs = values.double().topk(count, dim=-1).values.log()
    mean = (logs - logs[..., -1:]).mean(-1)
    return torch.where(torch.isfinite(mean) & (mean > 0), 1 + 1 / mean, torch.nan)


def effective_number(weights: Tensor) -> Tensor:
    """exp(entropy) of each row scaled to sum 1, the effective number of entries; [..., n] -> [...].

    A row of zeros has 0 of them.
    """
    total = weights.double().sum(-1, keepdim=True)
    share = weights.double() / total.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(total[..., 0] > 0, torch.exp(-torch.xlogy(share, share).sum(-1)), 0.0)
