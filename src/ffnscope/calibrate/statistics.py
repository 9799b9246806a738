"""Statistics: sums and maxima over tokens, from which every metric is computed.

Signals: ``x`` [n, d_model] FFN input, ``h`` [n, d_ff] channel activations (the input of the down projection), ``g``
[n, d_ff] the gradient of the summed token NLL with respect to ``h``; ``y`` [n, d_model] the FFN's output; ``core`` [k]
the indices of the supernode core; ``next_h`` and ``next_q`` h and h g of the next layer's FFN; ``document``,
``target`` and ``window`` marks of tokens; ``dy`` [n, d_model] the gradient with respect to ``y`` (see `Statistic`).
Parts of a batch are reduced in the model's dtype (at least float32) and accumulated in float64 (counts in int32), so
results do not depend on how text is split into batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ffnscope.metrics.histogram import BINS, FIRST_OCTAVE
from ffnscope.registry import statistic, stream_statistic

_MANTISSA_BITS = 2  # 4 = 2^2 bins per octave
_SHIFT = 23 - _MANTISSA_BITS
_OFFSET = (127 + FIRST_OCTAVE) << _MANTISSA_BITS
_FOLD = 128
_BLOCK = 256


@statistic("act_sum", reads=("h",), reduce="sum")
def act_sum(h: Tensor) -> Tensor:
    """Sum of h."""
    return h.sum(0)


@statistic("act_abs", reads=("h",), reduce="sum")
def act_abs(h: Tensor) -> Tensor:
    """Sum of |h|."""
    first, *others = h.split(_FOLD)
    total, size = first.abs(), torch.empty_like(first)
    for part in others:
        total[: len(part)] += torch.abs(part, out=size[: len(part)])
    return total.sum(0)


@statistic("act_sq", reads=("h",), reduce="sum")
def act_sq(h: Tensor) -> Tensor:
    """Sum of h^2."""
    return _sum_of_squares(h)


@statistic("act_window_sq", reads=("h", "window"), reduce="sum", in_place=True)
def act_window_sq(total: Tensor, h: Tensor, window: Tensor) -> None:
    """Sum over windows of the squared mean of |h| over their tokens; a window is never split."""
    windows, place, sizes = window.unique(return_inverse=True, return_counts=True)
    sums = h.new_zeros(len(windows), h.shape[1]).index_add_(0, place.to(h.device), h.abs())
    total.add_((sums / sizes.to(sums)[:, None]).square_().sum(0))


@statistic("act_hist", reads=("h",), reduce="sum", shape=(BINS, "d_ff"), every=32, counts=True)
def act_hist(counts: Tensor, h: Tensor) -> None:
    """Histogram of |h| over every 32nd token: 4 bins per octave from 2^-16 to 2^16, the ends take the rest.

    Bin b holds |h| in [edge(b), edge(b + 1)), see `ffnscope.metrics.histogram.bin_edges`. Within an octave the 4 bins
    have equal width (they are the two leading mantissa bits), so a bin is at most 25 % wide relative to its lower
    edge. Every 32nd token keeps the cost of the pass within a few per cent of a bare forward. ``counts`` [BINS, d_ff].
    """
    d_ff = h.shape[1]
    bins = h.float().abs().view(torch.int32).bitwise_right_shift_(_SHIFT).clamp_(_OFFSET, _OFFSET + BINS - 1)
    index = torch.add(_first_bins(d_ff, h.device), bins, alpha=d_ff).flatten()
    counts.view(-1).index_add_(0, index, torch.ones_like(index))


@statistic("grad_sq", reads=("g",), reduce="sum")
def grad_sq(g: Tensor) -> Tensor:
    """Sum of g^2."""
    return _sum_of_squares(g)


@statistic("taylor_abs", reads=("h", "g"), reduce="sum")
def taylor_abs(h: Tensor, g: Tensor) -> Tensor:
    """Sum of |h g|."""
    return _sum_in_parts(lambda h, g: (h * g).abs_(), h, g)


@statistic("taylor_sq", reads=("h", "g"), reduce="sum")
def taylor_sq(h: Tensor, g: Tensor) -> Tensor:
    """Sum of (h g)^2."""
    return _sum_in_parts(lambda h, g: (h * g).square_(), h, g)


@statistic("taylor_sum", reads=("h", "g"), reduce="sum")
def taylor_sum(h: Tensor, g: Tensor) -> Tensor:
    """Sum of h g, with sign."""
    return _sum_in_parts(torch.mul, h, g)


@statistic("taylor_core", reads=("h", "g", "core"), reduce="sum", shape=("core", "d_ff"), in_place=True)
def taylor_core(total: Tensor, h: Tensor, g: Tensor, core: Tensor) -> None:
    """Sum of q_s q_i over the core's channels s and all channels i, with q = h g."""
    q = h * g
    core = core.to(q.device)
    if torch.equal(core, torch.arange(q.shape[1], device=q.device)):
        _add_second_moment(total, q)
    else:
        total.add_(q[:, core].T @ q)


@statistic("taylor_next", reads=("h", "g", "core", "next_q"), reduce="sum", shape=("core", "next"), in_place=True)
def taylor_next(total: Tensor, h: Tensor, g: Tensor, core: Tensor, next_q: Tensor) -> None:
    """Sum of q_s q_j over the core's channels s and all channels j of the next layer's FFN, with q = h g."""
    q = h * g
    total.add_(q[:, core.to(q.device)].T @ next_q.to(q))


@statistic("act_next", reads=("h", "core", "next_h"), reduce="sum", shape=("core", "next"), in_place=True)
def act_next(total: Tensor, h: Tensor, core: Tensor, next_h: Tensor) -> None:
    """Sum of h_s h_j over the core's channels s and all channels j of the next layer's FFN."""
    total.add_(h[:, core.to(h.device)].T @ next_h.to(h))


@statistic("tokens_by_document", reads=("h", "document"), reduce="sum", shape=("document",), in_place=True)
def tokens_by_document(total: Tensor, h: Tensor, document: Tensor) -> None:
    """Tokens, by groups of documents: what means of activations divide by."""
    total.add_(torch.bincount(document, minlength=len(total)).to(total))


@statistic("targets_by_document", reads=("g", "document", "target"), reduce="sum", shape=("document",), in_place=True)
def targets_by_document(total: Tensor, g: Tensor, document: Tensor, target: Tensor) -> None:
    """Predicted tokens, by groups of documents: what means of gradients divide by."""
    total.add_(torch.bincount(document[target.bool()], minlength=len(total)).to(total))


@statistic("x_sum", reads=("x",), reduce="sum", shape=("d_model",))
def x_sum(x: Tensor) -> Tensor:
    """Sum of the FFN input."""
    return x.sum(0)


@statistic("ffn_in_sq", reads=("x",), reduce="sum", shape=("d_model",))
def ffn_in_sq(x: Tensor) -> Tensor:
    """Sum of squares of the FFN input."""
    return _sum_of_squares(x)


@statistic("ffn_out_sq", reads=("y",), reduce="sum", shape=("d_model",))
def ffn_out_sq(y: Tensor) -> Tensor:
    """Sum of squares of the FFN output (of an expert: before its bias and router weight)."""
    return _sum_of_squares(y)


@statistic("x_outer", reads=("x",), reduce="sum", shape=("d_model", "d_model"), in_place=True)
def x_outer(total: Tensor, x: Tensor) -> None:
    """Sum of x x^T, the second moment of the FFN input."""
    _add_second_moment(total, x)


@statistic("xh_outer", reads=("x", "h"), reduce="sum", shape=("d_model", "d_ff"), in_place=True)
def xh_outer(total: Tensor, x: Tensor, h: Tensor) -> None:
    """Sum of x h^T, the cross moment of FFN input and channels."""
    for rows, part in zip(total.split(_BLOCK), x.split(_BLOCK, dim=1), strict=True):
        rows.add_(part.T @ h)


@statistic("h_outer", reads=("h",), reduce="sum", shape=("d_ff", "d_ff"), in_place=True)
def h_outer(total: Tensor, h: Tensor) -> None:
    """Sum of h h^T, the second moment of the channels."""
    _add_second_moment(total, h)


@statistic("dy_outer", reads=("dy",), reduce="sum", shape=("d_model", "d_model"), in_place=True)
def dy_outer(total: Tensor, dy: Tensor) -> None:
    """Sum of dy dy^T, the second moment of the gradient of the FFN output (of an expert: before its router weight)."""
    _add_second_moment(total, dy)


@stream_statistic("x_sq", reads=("x",), shape=("d_model",), at=("ffn", "attention"))
def x_sq(x: Tensor) -> Tensor:
    """Sum of squares of what an FFN or an attention reads, after its norm."""
    return _sum_of_squares(x)


@stream_statistic("y_sq", reads=("y",), shape=("d_model",), at=("ffn", "attention"))
def y_sq(y: Tensor) -> Tensor:
    """Sum of squares of what an FFN or an attention puts out, before any norm."""
    return _sum_of_squares(y)


@stream_statistic("stream_sq", reads=("h",), at=("attention", "cut", "unembedding"))
def stream_sq(h: Tensor) -> Tensor:
    """Sum of squares of the residual stream at each cut, of attention's values, and of the normed final stream."""
    return _sum_of_squares(h)


@stream_statistic("stream_grad_sq", reads=("g",), at=("cut",))
def stream_grad_sq(g: Tensor) -> Tensor:
    """Sum of squared gradients of the residual stream at each cut."""
    return _sum_of_squares(g)


@stream_statistic("stream_taylor_sq", reads=("h", "g"), at=("attention",))
def stream_taylor_sq(h: Tensor, g: Tensor) -> Tensor:
    """Sum of (h g)^2 of attention's values."""
    return _sum_in_parts(lambda h, g: (h * g).square_(), h, g)


@functools.lru_cache(maxsize=16)
def _first_bins(d_ff: int, device: torch.device) -> Tensor:
    """Place of each channel in a flat histogram [BINS, d_ff], less that of a bin whose bits are 0."""
    return torch.arange(-_OFFSET * d_ff, (1 - _OFFSET) * d_ff, dtype=torch.int32, device=device)


def _add_second_moment(total: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to ``total`` in blocks: each pair of columns is multiplied once, and no large product is made."""
    width = rows.shape[1]
    for first in range(0, width, _BLOCK):
        last = min(first + _BLOCK, width)
        product = rows[:, first:last].T @ rows[:, first:]
        total[first:last, first:].add_(product)
        total[last:, first:last].add_(product[:, last - first :].T)


def _sum_of_squares(rows: Tensor) -> Tensor:
    """Sum over rows of their squares, folded into few rows first: a full matrix of squares would push the model's
    weights out of the cache."""
    first, *others = rows.split(_FOLD)
    total = first.square()
    for part in others:
        total[: len(part)].addcmul_(part, part)
    return total.sum(0)


def _sum_in_parts(term: Callable[..., Tensor], *signals: Tensor) -> Tensor:
    """Sum of ``term(*signals)`` over rows, a few rows at a time for the same reason."""
    total = signals[0].new_zeros(signals[0].shape[1])
    for rows in zip(*(signal.split(_FOLD) for signal in signals), strict=True):
        total += term(*rows).sum(0)
    return total
