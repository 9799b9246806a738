"""Two ways to prune on the same text: difference of their losses, with the standard error of the paired difference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.evaluate.perplexity import window_ratio


@dataclass(frozen=True, slots=True)
class PairedLoss:
    """Loss of one plan less that of another on the same windows.

    Attributes:
        first: label of the one.
        second: label of the other.
        difference: mean NLL of the first less that of the second, nats per token; negative = the first is better.
        stderr: standard error over documents; None for a single document.
        perplexities: of the first and of the second.
        documents: number of documents.
        n_targets: predicted tokens.
    """

    first: str
    second: str
    difference: float
    stderr: float | None
    perplexities: tuple[float, float]
    documents: int
    n_targets: int

    def row(self) -> dict[str, Any]:
        """Flat row for CSV and JSON."""
        return {
            "first": self.first,
            "second": self.second,
            "loss_difference": self.difference,
            "stderr": self.stderr,
            "perplexity_first": self.perplexities[0],
            "perplexity_second": self.perplexities[1],
            "documents": self.documents,
            "n_targets": self.n_targets,
        }


def paired_losses(nll: Mapping[str, Tensor], windows: Windows, pairs: Iterable[tuple[str, str]]) -> list[PairedLoss]:
    """Compare plans in pairs: what both find hard cancels, so small differences show.

    Args:
        nll: label -> summed NLL of each window [n], nats.
        windows: the text, which tells documents and predicted tokens.
        pairs: labels to compare.

    Raises:
        UsageError: an unknown label, or sums for another number of windows.
    """
    return [_paired(nll, windows, pair) for pair in pairs]


def _paired(nll: Mapping[str, Tensor], windows: Windows, pair: tuple[str, str]) -> PairedLoss:
    for label in pair:
        if label not in nll or nll[label].shape != (len(windows),):
            found = "nothing" if label not in nll else f"{nll[label].numel()} windows"
            raise UsageError(f"the loss of {label!r} was measured on {found}; expected {len(windows)} windows.")
    first, second = (nll[label].double().cpu() for label in pair)
    documents, place = windows.document.unique(return_inverse=True)
    zeros = torch.zeros(len(documents), dtype=torch.float64)
    counts = windows.targets.sum(1)
    value, stderr = window_ratio(zeros.index_add(0, place, first - second), zeros.index_add(0, place, counts.double()))
    n = int(counts.sum())
    perplexities = math.exp(float(first.sum()) / n), math.exp(float(second.sum()) / n)
    return PairedLoss(*pair, value, stderr, perplexities, len(documents), n)
