"""One FFN on some of its channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.sparse.kernels.rows import RowMatrix
from ffnscope.types import FFNWeights


@dataclass(frozen=True, slots=True, eq=False)
class RowWeights:
    """Weights of an FFN, every channel a row: gate, up and the transposed down [d_ff, d_model]; biases or None.

    In a plain FFN (gate None), h = act(up x).
    """

    gate: RowMatrix | None
    up: RowMatrix
    down: RowMatrix
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @staticmethod
    def of(weights: FFNWeights, *, compiled: bool = True) -> RowWeights:
        """Take canonical weights; only down is copied, if gate and up lie row by row in memory."""
        matrices = (weights.gate, weights.up, weights.down.T)
        gate, up, down = (None if m is None else RowMatrix(m, compiled=compiled) for m in matrices)
        assert up is not None and down is not None
        return RowWeights(gate, up, down, weights.gate_bias, weights.up_bias, weights.down_bias)


def sparse_ffn(x: Tensor, weights: RowWeights, index: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Output of an FFN whose channels outside ``index`` are zero, reading only the rows in it.

    Equal, but for rounding, to ``down (m * act(gate x) * (up x)) + bias`` with the mask m of ``index``.

    Args:
        x: [T, d_model], or [d_model].
        weights: the rows.
        index: int32 [k], distinct channels, 0 <= k <= d_ff; sorted ones are read faster.
        act: the activation, element by element.

    Returns:
        As x, in its dtype.

    Raises:
        UsageError: the index is of another dtype or shape.
    """
    if index.dtype != torch.int32 or index.dim() != 1:
        raise UsageError(f"expected an int32 index [k] of channels; got {index.dtype} {tuple(index.shape)}.")
    rows = x[None] if x.dim() == 1 else x
    h = _producer(rows, weights.up, weights.up_bias, index)
    h = act(h) if weights.gate is None else act(_producer(rows, weights.gate, weights.gate_bias, index)) * h
    y = weights.down.sum(h, index)
    if weights.down_bias is not None:
        y += weights.down_bias
    return y[0] if x.dim() == 1 else y


def _producer(x: Tensor, weight: RowMatrix, bias: Tensor | None, index: Tensor) -> Tensor:
    found = weight.dot(x, index)
    return found if bias is None else found + bias.index_select(0, index)
