"""Products with gathered rows in plain torch: any floating dtype, any device.

Rows are copied into memory that is kept between calls: a fresh block of this size is a page fault per page, which
makes the copy several times slower.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.nn import functional

_kept = threading.local()


def rows_dot(weight: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """Products [T, k] of x [T, width] with the rows ``index`` [k] of ``weight`` [n, width], in its dtype."""
    return functional.linear(x, _gather(weight, index))


def rows_sum(weight: Tensor, h: Tensor, index: Tensor) -> Tensor:
    """Sums [T, width] of the rows ``index`` [k] of ``weight`` [n, width], each times h [T, k], in its dtype."""
    if index.numel() == 0:
        return h.new_zeros(h.shape[0], weight.shape[1])
    if h.shape[0] == 1:  # reads the rows where they are
        return functional.embedding_bag(index[None], weight, per_sample_weights=h, mode="sum")
    return h @ _gather(weight, index)


def _gather(weight: Tensor, index: Tensor) -> Tensor:
    size = index.numel() * weight.shape[1]
    memory = _memory(weight)
    if memory.numel() < size:
        memory = weight.new_empty(size)
        vars(_kept)[_key(weight)] = memory
    return torch.index_select(weight, 0, index, out=memory[:size].view(-1, weight.shape[1]))


def _memory(weight: Tensor) -> Tensor:
    found = vars(_kept).get(_key(weight))
    return weight.new_empty(0) if found is None else found


def _key(weight: Tensor) -> str:
    return f"{weight.dtype} {weight.device}"
