"""Delete-a-group jackknife over documents, for numbers that one text or two calibrations give.

A text's documents are split into a few groups. The spread of a number over the calibrations that lack one group tells
its sampling error, for any metric, because only scores are needed. Groups rather than single documents: the overlap of
the top channels is not a smooth function of the text, for which deleting one document at a time would not do, and each
group costs another scoring.

The variance of a jackknife is too large rather than too small (Efron and Stein, «The jackknife estimate of variance»,
1981): for rankings that agree well, whose disagreement is a sum of squared errors, up to twice as large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ffnscope.calibrate.groups import GROUPS, document_groups

__all__ = ["GROUPS", "LeftOut", "document_groups", "jackknife_interval", "jackknife_variance", "one_sample_interval"]

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A number without each group of a calibration's documents.

    Attributes:
        values: the number without group g.
        shares: share of the calibration's tokens that group g holds; they sum to 1.
    """

    values: Sequence[float]
    shares: Sequence[float]


def jackknife_variance(value: float, left_out: LeftOut) -> float:
    """Variance of ``value`` from what it is without each group; groups may be of unequal size.

    After Busing, Meijer and van der Leeden, «Delete-m jackknife for unequal m», 1999. For G equal groups it is
    (G - 1) / G times the sum of squares around the mean.
    """
    shares = torch.tensor(left_out.shares, dtype=torch.float64)
    change = value - torch.tensor(left_out.values, dtype=torch.float64)
    odds = (1 - shares) / shares
    pseudo = odds * change
    return float(((pseudo - ((1 - shares) * change).sum()).square() / odds).mean())


def jackknife_interval(
    value: float, first: LeftOut, second: LeftOut, bounds: tuple[float, float]
) -> tuple[float, float]:
    """95 % interval of a number that compares two independent calibrations, within ``bounds``.

    ``value`` plus and minus the standard error times Student's t, with the degrees of freedom of Welch and
    Satterthwaite: the two variances come from a few groups each.
    """
    return _interval(value, (first, second), bounds)


def one_sample_interval(value: float, left_out: LeftOut, bounds: tuple[float, float]) -> tuple[float, float]:
    """95 % interval of a number that one text gives, within ``bounds``; see `jackknife_interval`."""
    return _interval(value, (left_out,), bounds)


def _interval(value: float, parts: Sequence[LeftOut], bounds: tuple[float, float]) -> tuple[float, float]:
    from scipy.stats import t

    variances = [jackknife_variance(value, one) for one in parts]
    total = sum(variances)
    if total == 0:
        return value, value
    freedom = total**2 / sum(v**2 / (len(one.values) - 1) for v, one in zip(variances, parts, strict=True))
    half = float(t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(total)
    return max(bounds[0], value - half), min(bounds[1], value + half)
