"""A mean over tokens with its interval over documents, which are the independent pieces of a text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.evaluate.perplexity import window_ratio

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A ratio of sums over documents.

    Attributes:
        value: the ratio.
        low: lower end of its 95 % interval over documents; None for a single document.
        high: upper end.
        documents: how many there are with a count above 0.
    """

    value: float
    low: float | None
    high: float | None
    documents: int

    @property
    def sign(self) -> int:
        """1 where the interval is above zero, -1 where it is below, else 0."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def over_documents(sums: Tensor, document: Tensor, counts: Tensor | None = None) -> Estimate:
    """sum(sums) / sum(counts) with its interval: Student's t with a standard error over documents (delta method).

    Args:
        sums: of windows or tokens [n].
        document: of each [n].
        counts: what they are divided by [n]; None counts each as 1, so that the value is the mean.

    Raises:
        UsageError: nothing to count.
    """
    of_documents, weights = sums_by_document(sums, document, document.unique(), counts)
    if not float(weights.sum()) > 0:
        raise UsageError("there is nothing to average: no token of any document counts.")
    value, stderr = window_ratio(of_documents, weights)
    n = int((weights > 0).sum())
    half = None if stderr is None else t_quantile(n - 1) * stderr
    return Estimate(value, None if half is None else value - half, None if half is None else value + half, n)


def sums_by_document(
    values: Tensor, document: Tensor, documents: Tensor, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sums of values [n, ...] of windows or tokens over each of some ``documents`` (ascending), and of their counts.

    Args:
        values: of windows or tokens.
        document: of each [n].
        documents: all that occur, and maybe more.
        counts: of each [n]; None counts each as 1.
    """
    place = torch.searchsorted(documents, document).cpu()
    zeros = torch.zeros(len(documents), dtype=torch.float64)
    sums = torch.zeros(len(documents), *values.shape[1:], dtype=torch.float64)
    ones = torch.ones(len(values), dtype=torch.float64) if counts is None else counts.double().cpu()
    return sums.index_add(0, place, values.double().cpu()), zeros.index_add(0, place, ones)


def t_quantile(degrees: int) -> float:
    """Half the width of a 95 % interval in standard errors, with so many degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, degrees))
