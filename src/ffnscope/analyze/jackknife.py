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
from torch import Tensor

from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError

GROUPS = 8
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


def document_groups(windows: Windows, groups: int = GROUPS, seed: int = 0) -> list[Tensor]:
    """Split windows into at most ``groups`` groups of whole documents with about as many tokens each.

    Documents in random order, the longest first, each go to the group with the fewest tokens so far. A text of one
    document is one group.

    Args:
        windows: a calibration text.
        groups: number of groups; fewer when there are fewer documents.
        seed: of the random order.

    Returns:
        One mask [n] bool per group; every window is in exactly one.

    Raises:
        UsageError: fewer than 2 groups asked for.
    """
    if groups < 2:
        raise UsageError(f"groups must be at least 2, the parts of a text that are left out in turn; got {groups}.")
    documents, place = windows.document.unique(return_inverse=True)
    sizes = torch.zeros(len(documents), dtype=torch.int64).index_add_(0, place, windows.valid.sum(1))
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    order = order[torch.sort(sizes[order], descending=True, stable=True).indices]
    filled = torch.zeros(min(groups, len(documents)), dtype=torch.int64)
    group_of = torch.empty_like(sizes)
    for document in order.tolist():
        lightest = int(filled.argmin())
        group_of[document] = lightest
        filled[lightest] += sizes[document]
    return [group_of[place] == g for g in range(len(filled))]


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
