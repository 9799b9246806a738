"""The laws of an FFN that reads selected channels, checked on random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ffnscope.errors import ContractError
from ffnscope.sparse.kernels.ffn import IN_TORCH, Act, RowWeights, sparse_ffn
from ffnscope.types import FFNWeights

D_MODEL, D_FF = 48, 80
DENSITIES = (0.0, 0.05, 0.5, 1.0)
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Of the largest output; sums may be accumulated in float32, whatever the dtype."""


class SparseFFN(Protocol):
    """An FFN like `sparse_ffn`."""

    def __call__(
        self, x: Tensor, weights: RowWeights, index: Tensor, act: Act, *, token_mask: Tensor | None = None
    ) -> Tensor:
        """Output [T, d_model] for x [T, d_model] on channels ``index``."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    """One FFN and one selection for some tokens."""

    name: str
    x: Tensor
    weights: FFNWeights
    index: Tensor
    token_mask: Tensor | None
    act: str

    def expected(self) -> Tensor:
        """The definition: all channels, then the mask."""
        w, channels = self.weights, self.index.long()
        mask = torch.zeros(len(self.x), D_FF, dtype=torch.bool)
        mask[:, channels] = True if self.token_mask is None else self.token_mask
        u, act = functional.linear(self.x, w.up, w.up_bias), IN_TORCH[self.act]
        h = act(u) if w.gate is None else act(functional.linear(self.x, w.gate, w.gate_bias)) * u
        return functional.linear(h * mask, w.down, w.down_bias)


def check_runtime(ffn: SparseFFN = sparse_ffn, *, dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCE)) -> None:
    """Check that an FFN which reads selected channels keeps the laws of its kind; silent when it does.

    The laws: it equals its masked-dense definition, ``down (mask * h) + bias``, within rounding, for gated and plain
    FFNs, with and without biases, for every activation, for one token and several, also with channels of their own,
    for no channel, few, half and all; the order of the index does not matter; arguments stay as they are; the same
    arguments give the same bits.

    Args:
        ffn: a function with the arguments of `sparse_ffn`.
        dtypes: the dtypes that it is for.

    Raises:
        ContractError: a law is broken; the message names it, and the case.
    """
    for dtype in dtypes:
        for case in _cases(dtype):
            _check(ffn, case, dtype)


def _cases(dtype: torch.dtype) -> Iterator[_Case]:
    draw = torch.Generator().manual_seed(0)
    for gated, biased in product((True, False), (True, False)):
        for n_tokens, density in product((1, 3), DENSITIES):
            for act in IN_TORCH if (n_tokens, density) == (1, 0.5) else ("silu",):
                weights = _weights(draw, dtype, gated=gated, biased=biased)
                x = torch.randn(n_tokens, D_MODEL, generator=draw).to(dtype)
                index = torch.randperm(D_FF, generator=draw)[: round(density * D_FF)].sort().values.int()
                own = None if n_tokens == 1 else torch.rand(n_tokens, len(index), generator=draw) < 0.5
                for token_mask in dict.fromkeys((None, own)):
                    own_channels = "" if token_mask is None else " with channels of their own"
                    name = (
                        f"{str(dtype).removeprefix('torch.')}, {'gated' if gated else 'plain'}, "
                        f"{'with' if biased else 'no'} biases, {act}, {n_tokens} tokens{own_channels}, "
                        f"{len(index)} of {D_FF} channels"
                    )
                    yield _Case(name, x, weights, index, token_mask, act)


def _weights(draw: torch.Generator, dtype: torch.dtype, *, gated: bool, biased: bool) -> FFNWeights:
    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=draw) / shape[-1] ** 0.5).to(dtype)

    gate = random(D_FF, D_MODEL) if gated else None
    biases = [random(n) if biased and (gated or i) else None for i, n in enumerate((D_FF, D_FF, D_MODEL))]
    return FFNWeights(gate, random(D_FF, D_MODEL), random(D_MODEL, D_FF), *biases)


def _check(ffn: SparseFFN, case: _Case, dtype: torch.dtype) -> None:
    rows = RowWeights.of(case.weights)
    matrices = [m.weight for m in (rows.gate, rows.up, rows.down) if m is not None]
    given = [t for t in (case.x, case.index, case.token_mask, *matrices) if t is not None]
    before, expected = [t.clone() for t in given], case.expected()
    found = ffn(case.x, rows, case.index, case.act, token_mask=case.token_mask)
    if not all(torch.equal(t, old) for t, old in zip(given, before, strict=True)):
        raise _broken("purity", "it changed its arguments", case)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        what = f"returned {found.dtype} {tuple(found.shape)}; expected {expected.dtype} {tuple(expected.shape)}"
        raise _broken("shape", what, case)
    _near(found, expected, dtype, "the masked-dense definition", case)
    again = ffn(case.x, rows, case.index, case.act, token_mask=case.token_mask)
    if not torch.equal(found, again):
        raise _broken("determinism", "two calls with the same arguments differ", case)
    order = torch.arange(len(case.index) - 1, -1, -1)
    own = None if case.token_mask is None else case.token_mask[:, order]
    turned = ffn(case.x, rows, case.index[order].contiguous(), case.act, token_mask=own)
    _near(turned, expected, dtype, "any order of the index", case)


def _near(found: Tensor, expected: Tensor, dtype: torch.dtype, law: str, case: _Case) -> None:
    distance = float((found.double() - expected.double()).abs().max())
    limit = TOLERANCE[dtype] * max(1.0, float(expected.double().abs().max()))
    if not distance <= limit:
        raise _broken(law, f"it is off by {distance:.2g}; expected at most {limit:.2g}", case)


def _broken(law: str, what: str, case: _Case) -> ContractError:
    return ContractError(f"the sparse FFN breaks the law of {law}: {what} ({case.name}).")
