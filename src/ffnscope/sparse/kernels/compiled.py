"""Products with gathered rows, compiled by numba. Imported only at the first use, and only where numba is installed.

Rows are float32, or bfloat16 as uint16; everything else is float32. The decorated functions stand at module level
because numba keeps compiled code on disk only for those.
"""
# numba has no type stubs, and what it compiles is no ordinary Python
# pyright: basic

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

# sums may be reordered, which vectorises them; NaN and infinity keep their meaning
REORDER: Any = {"reassoc", "contract", "nsz"}
BLOCK = 4
"""Rows that are read at once: as many streams from memory, and one pass over x or y for all of them."""


@intrinsic
def _widen(context, value):  # noqa: ANN001, ANN202 - the signature that numba asks for
    """float32 of a stored number: itself, or bfloat16 as uint16, which is the upper half of a float32."""
    if value == types.float32:
        return types.float32(value), lambda context, builder, signature, args: args[0]

    def expand(context, builder, signature, args):  # noqa: ANN001, ANN202
        upper = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(upper, ir.FloatType())

    return types.float32(value), expand


@njit(fastmath=REORDER, nogil=True, cache=True)
def _dot(weight, x, index, out, start, stop):
    """out[t, i] = weight[index[i]] . x[t] for start <= i < stop."""
    i = start
    while i + BLOCK <= stop:
        a, b, c, d = index[i], index[i + 1], index[i + 2], index[i + 3]
        for t in range(x.shape[0]):
            sum_a = sum_b = sum_c = sum_d = np.float32(0)
            for j in range(x.shape[1]):
                value = x[t, j]
                sum_a += _widen(weight[a, j]) * value
                sum_b += _widen(weight[b, j]) * value
                sum_c += _widen(weight[c, j]) * value
                sum_d += _widen(weight[d, j]) * value
            out[t, i], out[t, i + 1], out[t, i + 2], out[t, i + 3] = sum_a, sum_b, sum_c, sum_d
        i += BLOCK
    while i < stop:
        a = index[i]
        for t in range(x.shape[0]):
            sum_a = np.float32(0)
            for j in range(x.shape[1]):
                sum_a += _widen(weight[a, j]) * x[t, j]
            out[t, i] = sum_a
        i += 1


@njit(fastmath=REORDER, nogil=True, cache=True)
def _sum(weight, h, index, out, start, stop):
    """out[t] = sum of h[t, i] * weight[index[i]] over start <= i < stop."""
    out[:] = np.float32(0)
    i = start
    while i + BLOCK <= stop:
        a, b, c, d = index[i], index[i + 1], index[i + 2], index[i + 3]
        for t in range(h.shape[0]):
            h_a, h_b, h_c, h_d = h[t, i], h[t, i + 1], h[t, i + 2], h[t, i + 3]
            for j in range(out.shape[1]):
                first = h_a * _widen(weight[a, j]) + h_b * _widen(weight[b, j])
                out[t, j] += first + h_c * _widen(weight[c, j]) + h_d * _widen(weight[d, j])
        i += BLOCK
    while i < stop:
        a = index[i]
        for t in range(h.shape[0]):
            h_a = h[t, i]
            for j in range(out.shape[1]):
                out[t, j] += h_a * _widen(weight[a, j])
        i += 1


@njit(parallel=True, cache=True)
def _dot_parallel(weight, x, index, out, n_parts):
    for part in prange(n_parts):
        k = index.shape[0]
        _dot(weight, x, index, out, part * k // n_parts, (part + 1) * k // n_parts)


@njit(parallel=True, cache=True)
def _sum_parallel(weight, h, index, parts):
    n_parts = parts.shape[0]
    for part in prange(n_parts):
        k = index.shape[0]
        _sum(weight, h, index, parts[part], part * k // n_parts, (part + 1) * k // n_parts)


def rows_dot(weight: np.ndarray, x: np.ndarray, index: np.ndarray, n_parts: int) -> np.ndarray:
    """Products [T, k] float32 of x [T, width] with the rows ``index`` [k] int32 of ``weight`` [n, width].

    The list of rows is split into ``n_parts`` pieces, one per thread.
    """
    out = np.empty((x.shape[0], index.shape[0]), np.float32)
    if n_parts == 1:
        _dot(weight, x, index, out, 0, index.shape[0])
    else:
        _dot_parallel(weight, x, index, out, n_parts)
    return out


def rows_sum(weight: np.ndarray, h: np.ndarray, index: np.ndarray, n_parts: int) -> np.ndarray:
    """Sums [T, width] float32 of the rows ``index`` [k] int32 of ``weight`` [n, width], each times h [T, k].

    Every thread has an output of its own; they are added at the end.
    """
    if n_parts == 1:
        out = np.empty((h.shape[0], weight.shape[1]), np.float32)
        _sum(weight, h, index, out, 0, index.shape[0])
        return out
    parts = np.empty((n_parts, h.shape[0], weight.shape[1]), np.float32)
    _sum_parallel(weight, h, index, parts)
    return parts.sum(0)
