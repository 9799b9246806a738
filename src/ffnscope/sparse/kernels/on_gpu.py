"""Products with gathered rows on a GPU, compiled by Triton. Imported only at the first use, and only where it is there.

Rows are float32, bfloat16 or float16; sums are accumulated in float32. With TRITON_INTERPRET=1 the same code runs on
tensors of the CPU, very slowly, which is how it is tested without a GPU.
"""
# Triton has no type stubs, is not installed everywhere, and what it compiles is no ordinary Python
# pyright: basic, reportMissingImports=false, reportIndexIssue=false
# ruff: noqa: PLR0913 (a kernel takes every pointer and size by itself)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 8, 256
"""Rows and columns of a tile in products with x."""
SUM_ROWS, SUM_COLUMNS = 32, 64
"""Rows and columns of a tile in sums of rows."""
MOST_SLICES = 32
"""Programs that share the rows of a sum, for each piece of the columns."""


@triton.jit
def _dot_kernel(weight, x, index, out, k, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[t, i] = weight[index[i]] . x[t] for one token and some rows."""
    t = tl.program_id(0)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows = tl.load(index + i, mask=i < k, other=0).to(tl.int64)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        inside = (i < k)[:, None] & (j < width)[None, :]
        values = tl.load(x + t * width + j, mask=j < width, other=0.0).to(tl.float32)
        tile = tl.load(weight + rows[:, None] * width + j[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(tile * values[None, :], axis=1)
    tl.store(out + t * k + i, total, mask=i < k)


@triton.jit
def _activate(g, ACT: tl.constexpr):
    """Activation number ACT of `rows.ACTIVATIONS`."""
    if ACT == 0:
        return g * tl.sigmoid(g)
    elif ACT == 1:
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif ACT == 2:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        return g * tl.sigmoid(2.0 * inner)  # (1 + tanh a) / 2 = sigmoid(2 a)
    elif ACT == 3:
        return tl.where(g < 0.0, 0.0, g)  # NaN stays
    else:
        return tl.where(g < 0.0, 0.0, g * g)


@triton.jit
def _gated_kernel(
    gate,
    up,
    gate_bias,
    up_bias,
    x,
    index,
    out,
    k,
    width,
    ACT: tl.constexpr,
    BIASES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[t, i] = act(gate[index[i]] . x[t]) * (up[index[i]] . x[t]) for one token and some rows."""
    t = tl.program_id(0)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows = tl.load(index + i, mask=i < k, other=0).to(tl.int64)
    g = tl.zeros((ROWS,), tl.float32)
    u = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        inside = (i < k)[:, None] & (j < width)[None, :]
        place = rows[:, None] * width + j[None, :]
        values = tl.load(x + t * width + j, mask=j < width, other=0.0).to(tl.float32)[None, :]
        g += tl.sum(tl.load(gate + place, mask=inside, other=0.0).to(tl.float32) * values, axis=1)
        u += tl.sum(tl.load(up + place, mask=inside, other=0.0).to(tl.float32) * values, axis=1)
    if BIASES:
        g += tl.load(gate_bias + rows, mask=i < k, other=0.0).to(tl.float32)
        u += tl.load(up_bias + rows, mask=i < k, other=0.0).to(tl.float32)
    tl.store(out + t * k + i, _activate(g, ACT) * u, mask=i < k)


@triton.jit
def _sum_kernel(weight, h, index, out, k, width, n_tokens, per_slice, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[slice, t] = sum of h[t, i] * weight[index[i]] over the rows of a slice, for some columns."""
    t, piece, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    j = piece * COLUMNS + tl.arange(0, COLUMNS)
    first = part * per_slice
    last = tl.minimum(first + per_slice, k)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, per_slice, ROWS):
        i = first + start + tl.arange(0, ROWS)
        rows = tl.load(index + i, mask=i < last, other=0).to(tl.int64)
        values = tl.load(h + t * k + i, mask=i < last, other=0.0).to(tl.float32)
        inside = (i < last)[:, None] & (j < width)[None, :]
        tile = tl.load(weight + rows[:, None] * width + j[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(tile * values[:, None], axis=0)
    tl.store(out + (part * n_tokens + t) * width + j, total, mask=j < width)


def rows_dot(weight: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """Products [T, k] float32 of x [T, width] with the rows ``index`` [k] int32 of ``weight`` [n, width]."""
    x, k = x.contiguous(), index.numel()
    out = x.new_empty(x.shape[0], k, dtype=torch.float32)
    if out.numel():
        grid = (x.shape[0], triton.cdiv(k, ROWS))
        _dot_kernel[grid](weight, x, index, out, k, weight.shape[1], ROWS=ROWS, COLUMNS=COLUMNS)
    return out


def rows_gated(gate: Any, up: Any, biases: Any, act: int, x: Tensor, index: Tensor) -> Tensor:
    """act(gate x) * (up x) [T, k] float32 on the rows ``index`` [k] int32, in one launch.

    Args:
        gate: [n, width].
        up: [n, width].
        biases: of gate and up [n], or None.
        act: number of the activation in `rows.ACTIVATIONS`.
        x: [T, width].
        index: int32 [k].
    """
    x, k = x.contiguous(), index.numel()
    out = x.new_empty(x.shape[0], k, dtype=torch.float32)
    if out.numel():
        grid = (x.shape[0], triton.cdiv(k, ROWS))
        first, second = biases or (gate, up)
        sizes = {"ACT": act, "BIASES": biases is not None, "ROWS": ROWS, "COLUMNS": COLUMNS}
        _gated_kernel[grid](gate, up, first, second, x, index, out, k, gate.shape[1], **sizes)
    return out


def rows_sum(weight: Tensor, h: Tensor, index: Tensor) -> Tensor:
    """Sums [T, width] float32 of the rows ``index`` [k] int32 of ``weight`` [n, width], each times h [T, k].

    Rows are split into slices, whose sums are added at the end in a fixed order: results do not depend on timing.
    """
    h, k, width = h.contiguous(), index.numel(), weight.shape[1]
    if not k or not h.shape[0]:
        return h.new_zeros(h.shape[0], width, dtype=torch.float32)
    n_slices = min(MOST_SLICES, triton.cdiv(k, SUM_ROWS))
    per_slice = triton.cdiv(triton.cdiv(k, n_slices), SUM_ROWS) * SUM_ROWS
    n_slices = triton.cdiv(k, per_slice)
    out = h.new_empty(n_slices, h.shape[0], width, dtype=torch.float32)
    grid = (h.shape[0], triton.cdiv(width, SUM_COLUMNS), n_slices)
    sizes = {"ROWS": SUM_ROWS, "COLUMNS": SUM_COLUMNS}
    _sum_kernel[grid](weight, h, index, out, k, width, h.shape[0], per_slice, **sizes)
    return out.sum(0)
