"""One FFN on some of its channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ffnscope.errors import UsageError, unknown_name
from ffnscope.sparse.kernels.rows import (
    ACTIVATIONS,
    RowMatrix,
    as_float32,
    compiled_kernels,
    gpu_kernels,
    n_parts,
)
from ffnscope.sparse.products import Products
from ffnscope.types import FFNWeights

Act = str | Callable[[Tensor], Tensor]
IN_TORCH: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu_squared": lambda x: functional.relu(x).square(),
}


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
    arrays: Any = field(init=False, default=None)
    """What compiled code takes, where it reads all matrices: gate, up, down, gate_bias, up_bias."""

    def __post_init__(self) -> None:
        gate, up, down = (m and m.array for m in (self.gate, self.up, self.down))
        if up is None or down is None or (self.gate is not None and gate is None):
            return
        biases = [as_float32(self.up.weight.new_empty(0) if b is None else b) for b in (self.gate_bias, self.up_bias)]
        object.__setattr__(self, "arrays", (up[:0] if gate is None else gate, up, down, *biases))

    @staticmethod
    def of(weights: FFNWeights, *, compiled: bool = True) -> RowWeights:
        """Take canonical weights; only down is copied, if gate and up lie row by row in memory."""
        matrices = (weights.gate, weights.up, weights.down.T)
        gate, up, down = (None if m is None else RowMatrix(m, compiled=compiled) for m in matrices)
        assert up is not None and down is not None
        return RowWeights(gate, up, down, weights.gate_bias, weights.up_bias, weights.down_bias)


def sparse_ffn(
    x: Tensor,
    weights: RowWeights,
    index: Tensor,
    act: Act,
    *,
    token_mask: Tensor | None = None,
    known: Products | None = None,
) -> Tensor:
    """Output of an FFN whose channels outside ``index`` are zero, reading only the rows in it.

    Equal, but for rounding, to ``down (m * act(gate x) * (up x)) + bias`` with the mask m of ``index``. Compiled code
    rounds only x and the result to the dtype of x; everything between is float32.

    Args:
        x: [T, d_model], or [d_model].
        weights: the rows.
        index: int32 [k], distinct channels, 0 <= k <= d_ff; sorted ones are read faster.
        act: name of one of ACTIVATIONS, which compiled code computes in the same call; or any function that works
            element by element.
        token_mask: bool [T, k], which of the channels in ``index`` each token has; None = all of them.
        known: products on the channels [T, k] in the dtype of x that have been made already: their matrices are not
            read.

    Returns:
        As x, in its dtype.

    Raises:
        UsageError: the index is of another dtype or shape.
        UnknownNameError: no activation of this name.
    """
    if index.dtype != torch.int32 or index.dim() != 1:
        raise UsageError(f"expected an int32 index [k] of channels; got {index.dtype} {tuple(index.shape)}.")
    if isinstance(act, str) and act not in IN_TORCH:
        raise unknown_name("activation", act, IN_TORCH)
    rows = x[None] if x.dim() == 1 else x
    if weights.arrays is not None and isinstance(act, str) and token_mask is None and not known:
        kind = ACTIVATIONS.index(act)
        found = compiled_kernels().ffn(weights.arrays, kind, as_float32(rows), index.numpy(), n_parts(index))
        y = torch.from_numpy(found).to(x.dtype)
    else:
        h = _channels(rows, weights, index, act, known or Products())
        y = weights.down.sum(h if token_mask is None else h * token_mask, index)
    if weights.down_bias is not None:
        y = y + weights.down_bias
    return y[0] if x.dim() == 1 else y


def _channels(x: Tensor, weights: RowWeights, index: Tensor, act: Act, known: Products) -> Tensor:
    gate, up = weights.gate, weights.up
    biases = None if weights.gate_bias is None else (weights.gate_bias, weights.up_bias)
    alike = (biases is None) == (weights.up_bias is None)
    if gate is not None and gate.on_gpu and up.on_gpu and isinstance(act, str) and alike and not known:
        kind = ACTIVATIONS.index(act)
        return gpu_kernels().rows_gated(gate.weight, up.weight, biases, kind, x, index).to(x.dtype)
    function = IN_TORCH[act] if isinstance(act, str) else act
    u = _producer(x, up, weights.up_bias, index) if known.up is None else known.up
    if gate is None:
        return function(u)
    return function(_producer(x, gate, weights.gate_bias, index) if known.gate is None else known.gate) * u


def _producer(x: Tensor, weight: RowMatrix, bias: Tensor | None, index: Tensor) -> Tensor:
    found = weight.dot(x, index)
    return found if bias is None else found + bias.index_select(0, index)
