"""Products with |W| or W^2 in one read of W: a block of rows at a time, so that no copy of W is made."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ffnscope.graph import Matrix

SIZE = 2**18
"""Entries per block: 1 MiB in float32, which stays in the cache while several products are taken."""


def row_blocks(weight: Tensor, power: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, |W|^power of these rows) in float32, or float64 for a float64 weight; [n, n_in]."""
    step = max(1, SIZE // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        part = slice(first, min(first + step, weight.shape[0]))
        yield part, _powered(weight[part], power)


def column_sums(matrix: Matrix, power: int) -> Tensor:
    """Mean over rows of |W|^power, [n_in] float64: one read."""
    total = torch.zeros(matrix.shape[1], dtype=torch.float64)
    with matrix.read() as weight:
        for _, block in row_blocks(weight, power):
            total += block.sum(0).double().cpu()
    return total / matrix.shape[0]


def product(block: Tensor, vector: Tensor) -> Tensor:
    """``block @ vector`` in float64 on the CPU, for a vector (or columns of several) in float64.

    The largest entry of the vector is divided out before it goes to float32.
    """
    largest = float(vector.abs().max()) if vector.numel() else 0.0
    if largest == 0.0:
        return torch.zeros(block.shape[0], *vector.shape[1:], dtype=torch.float64)
    scaled = (vector / largest).to(block.device, block.dtype)
    return (block @ scaled).double().cpu() * largest


def _powered(part: Tensor, power: int) -> Tensor:
    wide = part if part.dtype in (torch.float32, torch.float64) else part.float()
    return wide.abs() if power == 1 else wide.square()
