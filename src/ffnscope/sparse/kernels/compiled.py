"""Products with gathered rows, compiled by numba. Imported only at the first use, and only where numba is installed.

Rows are float32, or bfloat16 as uint16; everything else is float32. The decorated functions stand at module level
because numba keeps compiled code on disk only for those.
"""
# numba has no type stubs, and what it compiles is no ordinary Python
# pyright: basic

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

# sums may be reordered, which vectorises them; NaN and infinity keep their meaning
REORDER: Any = {"reassoc", "contract", "nsz"}
compiled_in: Any = intrinsic
BLOCK = 4
"""Rows that are read at once: as many streams from memory, and one pass over x or y for all of them."""

_one_at_a_time = threading.Lock()  # numba's simplest pool of threads ends the process when two callers share it


def compile_(**options: Any) -> Callable[[Any], Any]:
    """Compile a function at its first call; kept on disk where there is a folder that can be written."""

    def decorate(function: Any) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # neither beside this file nor in the user's cache folder
            return njit(**options)(function)

    return decorate


@compiled_in
def _widen(context, value):
    """float32 of a stored number: itself, or bfloat16 as uint16, which is the upper half of a float32."""
    if value == types.float32:
        return types.float32(value), lambda context, builder, signature, args: args[0]

    def expand(context, builder, signature, args):
        upper = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(upper, ir.FloatType())

    return types.float32(value), expand


@compile_(fastmath=REORDER, nogil=True)
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


@compile_(nogil=True)
def _activate(kind, value):
    """Activation number ``kind`` of `rows.ACTIVATIONS`."""
    one = np.float32(1)
    if kind == 0:
        return value / (one + np.exp(-value))
    if kind == 1:
        return np.float32(0.5) * value * (one + math.erf(value * np.float32(0.5**0.5)))
    if kind == 2:
        inner = np.float32((2 / np.pi) ** 0.5) * (value + np.float32(0.044715) * value * value * value)
        return np.float32(0.5) * value * (one + np.tanh(inner))
    positive = value if value > 0 or value != value else np.float32(0)
    return positive if kind == 3 else positive * positive


@compile_(fastmath=REORDER, nogil=True)
def _gated(gate, up, x, index, h, start, stop):
    """g and u of two rows at once, which are four streams from memory: h[0] = gate x, h[1] = up x, both [T, k]."""
    i = start
    while i < stop:
        a, b = index[i], index[min(i + 1, stop - 1)]  # an odd last row is read twice, from the cache
        for t in range(x.shape[0]):
            g_a = g_b = u_a = u_b = np.float32(0)
            for j in range(x.shape[1]):
                value = x[t, j]
                g_a += _widen(gate[a, j]) * value
                u_a += _widen(up[a, j]) * value
                g_b += _widen(gate[b, j]) * value
                u_b += _widen(up[b, j]) * value
            h[0, t, i], h[1, t, i] = g_a, u_a
            if i + 1 < stop:
                h[0, t, i + 1], h[1, t, i + 1] = g_b, u_b
        i += 2


@compile_(fastmath=REORDER, nogil=True)
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


@compile_(nogil=True)
def _ffn(weights, act, x, index, h, out, piece):
    gate, up, down, gate_bias, up_bias = weights
    start, stop = piece
    gated = gate.shape[0] > 0
    if gated:
        _gated(gate, up, x, index, h, start, stop)
    else:
        _dot(up, x, index, h[1], start, stop)
    for t in range(x.shape[0]):
        for i in range(start, stop):
            u = h[1, t, i] + (up_bias[index[i]] if up_bias.shape[0] else np.float32(0))
            if gated:
                g = h[0, t, i] + (gate_bias[index[i]] if gate_bias.shape[0] else np.float32(0))
                h[0, t, i] = _activate(act, g) * u
            else:
                h[0, t, i] = _activate(act, u)
    _sum(down, h[0], index, out, start, stop)


@compile_(parallel=True)
def _ffn_parallel(weights, act, x, index, h, parts):
    n_parts = parts.shape[0]
    for part in prange(n_parts):
        k = index.shape[0]
        piece = part * k // n_parts, (part + 1) * k // n_parts
        _ffn(weights, act, x, index, h, parts[part], piece)


@compile_(parallel=True)
def _dot_parallel(weight, x, index, out, n_parts):
    for part in prange(n_parts):
        k = index.shape[0]
        _dot(weight, x, index, out, part * k // n_parts, (part + 1) * k // n_parts)


@compile_(parallel=True)
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
        with _one_at_a_time:
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
    with _one_at_a_time:
        _sum_parallel(weight, h, index, parts)
    return parts.sum(0)


def ffn(weights: Any, act: int, x: np.ndarray, index: np.ndarray, n_parts: int) -> np.ndarray:
    """Output [T, d_model] float32 of an FFN on the channels ``index``, without the bias of down, in one call.

    Args:
        weights: gate, up and the transposed down [d_ff, d_model], float32 biases [d_ff] of gate and up; what has no
            rows or entries is not there.
        act: number of the activation.
        x: [T, d_model] float32.
        index: [k] int32.
        n_parts: threads.
    """
    h = np.empty((2, x.shape[0], index.shape[0]), np.float32)
    out = np.empty((n_parts, x.shape[0], x.shape[1]), np.float32)
    if n_parts == 1:
        _ffn(weights, act, x, index, h, out[0], (0, index.shape[0]))
        return out[0]
    with _one_at_a_time:
        _ffn_parallel(weights, act, x, index, h, out)
    return out.sum(0)
