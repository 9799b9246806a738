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
    weights = torch.ones(len(sums), dtype=torch.float64) if counts is None else counts.double().cpu()
    if not float(weights.sum()) > 0:
        raise UsageError("there is nothing to average: no token of any document counts.")
    known, place = document.unique(return_inverse=True)
    of_documents = [
        torch.zeros(len(known), dtype=torch.float64).index_add_(0, place.cpu(), one)
        for one in (sums.double().cpu(), weights)
    ]
    value, stderr = window_ratio(*of_documents)
    n = int((of_documents[1] > 0).sum())
    half = None if stderr is None else t_quantile(n - 1) * stderr
    return Estimate(value, None if half is None else value - half, None if half is None else value + half, n)


def t_quantile(degrees: int) -> float:
    """Half the width of a 95 % interval in standard errors, with so many degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, degrees))
