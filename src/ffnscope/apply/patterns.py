"""Which single weights of a matrix stay, by their scores: a fraction of them, or N of every M neighbours."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnscope.errors import UsageError

_ROUNDING = 1e-9  # 0.29 of 100 weights are 29, though 0.29 * 100 is below that


@dataclass(frozen=True, slots=True)
class Pattern:
    """How sparse a matrix becomes.

    Attributes:
        sparsity: fraction of the weights that are removed.
        group: (N, M) where N of every M neighbouring weights stay, or None for weights anywhere ("unstructured").
    """

    sparsity: float
    group: tuple[int, int] | None = None

    @property
    def label(self) -> str:
        """What tables call it: "unstructured", or "2:4"."""
        return "unstructured" if self.group is None else f"{self.group[0]}:{self.group[1]}"

    def n_removed(self, width: int) -> int:
        """How many of ``width`` weights that are compared with each other are removed: rounded down."""
        return int(self.sparsity * width + _ROUNDING)


def pattern_of(sparsity: float | str) -> Pattern:
    """Read a fraction of weights to remove, or a pattern "N:M": N of every M neighbours stay.

    Example:
        >>> pattern_of("2:4")
        Pattern(sparsity=0.5, group=(2, 4))

    Raises:
        UsageError: neither.
    """
    if isinstance(sparsity, str):
        match = re.fullmatch(r"(\d+):(\d+)", sparsity)
        if match and 0 < int(match[1]) < int(match[2]):
            n, m = int(match[1]), int(match[2])
            return Pattern(1 - n / m, (n, m))
        raise UsageError(
            f"a pattern of weights is N:M with 0 < N < M, such as '2:4' (2 of every 4 stay); got {sparsity!r}."
        )
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity must be in [0, 1), the fraction of weights to remove; got {sparsity}.")
    return Pattern(float(sparsity))


def highest(scores: Tensor, pattern: Pattern) -> Tensor:
    """Mask of the weights that stay, [rows, width], True = keep: in every row, the highest scores.

    With a group, in every M neighbours of a row; ``width`` must be a multiple of M. Of equal scores, the last stay.

    Example:
        >>> highest(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), Pattern(0.5))
        tensor([[ True, False, False,  True]])
    """
    if pattern.group is not None:
        n, m = pattern.group
        return _without_lowest(scores.reshape(-1, m), m - n).view(scores.shape)
    return _without_lowest(scores, pattern.n_removed(scores.shape[1]))


def _without_lowest(scores: Tensor, count: int) -> Tensor:
    lowest = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, lowest, value=False)
