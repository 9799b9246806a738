"""What a tensor is made of, channel by channel: derivatives tell whether it is the activation of an FFN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from ffnscope.types import Fused

TRIALS = 6


@dataclass(frozen=True, slots=True)
class Kind:
    """An FFN activation: which producer is the gate (None for a plain FFN), and the order of fused halves."""

    gate: int | None
    fused: Fused | None = None


class Refusal(Enum):
    """Why a tensor that is computed position by position cannot be cut into channels."""

    CHANNELS = auto()
    PRODUCERS = auto()


def classify(x: Tensor, outputs: Sequence[Tensor]) -> Kind | Refusal | None:
    """Tell how x [.., T, d_ff] depends on the outputs that it was computed from.

    The first two tokens and the last of the outputs must be the same. Returns None for anything that is no FFN:
    attention and other mixing of tokens, sums, low-rank pairs, products with other inputs.
    """
    d_ff = x.shape[-1]
    widths = {o.shape[-1] for o in outputs}
    if any(o.shape[:-1] != x.shape[:-1] for o in outputs) or not widths <= {d_ff, 2 * d_ff}:
        return None
    if not _is_local(x, outputs) or _is_linear(x, outputs) or not _alike(x.flatten(0, -2)[[0, 1, -1]]):
        return None
    if len(outputs) > 2 or (len(outputs) == 2 and 2 * d_ff in widths):
        return Refusal.PRODUCERS
    fused = widths == {2 * d_ff}
    if not _is_diagonal(x, outputs, halves=2 if fused else 1):
        return Refusal.CHANNELS
    halves = (slice(0, d_ff), slice(d_ff, 2 * d_ff))
    factors = _factors(x, [(outputs[0], h) for h in halves] if fused else [(o, slice(None)) for o in outputs])
    if len(factors) == 1:
        return Kind(None)
    gate = _which_is_gate(factors)
    return Kind(gate, None if not fused else "gate_up" if gate == 0 else "up_gate")


@dataclass(frozen=True, slots=True, eq=False)
class _Factor:
    """What x is computed from, with dx/dvalue per element and the mean size of the second derivative."""

    value: Tensor
    derivative: Tensor
    curvature: float


def _factors(x: Tensor, parts: list[tuple[Tensor, slice]]) -> list[_Factor]:
    """Differentiate a channel-diagonal x twice by each part of an output."""
    factors: list[_Factor] = []
    for output, part in parts:
        (first,) = torch.autograd.grad(x.sum(), output, create_graph=True)
        derivative, curvature = first[..., part], 0.0
        if derivative.requires_grad:
            second: Any = torch.autograd.grad(derivative.sum(), output, retain_graph=True, allow_unused=True)[0]
            curvature = 0.0 if second is None else float(second[..., part].abs().mean())
        factors.append(_Factor(output.detach()[..., part], derivative.detach(), curvature))
    return factors


def _is_local(x: Tensor, outputs: Sequence[Tensor]) -> bool:
    """Whether a token of x depends on the same token of every output alone."""
    tokens = x.flatten(0, -2)
    for t in (len(tokens) // 2, len(tokens) - 1):
        weight = torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(t)).to(x) + 0.5
        grads: Any = torch.autograd.grad((tokens[t] * weight).sum(), outputs, retain_graph=True, allow_unused=True)
        for grad in grads:
            rows = [] if grad is None else (grad.flatten(0, -2) != 0).any(-1).nonzero().flatten().tolist()
            if set(rows) - {t}:
                return False
    return True


def _is_linear(x: Tensor, outputs: Sequence[Tensor]) -> bool:
    """Whether the derivative of x is the same at every token."""
    grads = torch.autograd.grad(x.sum(), outputs, retain_graph=True)
    return all(_alike(g.flatten(0, -2)) for g in grads)


def _is_diagonal(x: Tensor, outputs: Sequence[Tensor], halves: int) -> bool:
    """Whether random subsets of x depend on the same subset of every output, and nearly all of it."""
    touched = [torch.zeros(o.shape[-1], dtype=torch.bool, device=x.device) for o in outputs]
    for trial in range(TRIALS):
        mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(trial)).to(x.device) < 0.5
        grads = torch.autograd.grad((x * mask).sum(), outputs, retain_graph=True)
        allowed = torch.cat([mask] * halves, -1)
        for i, grad in enumerate(grads):
            nonzero = grad != 0
            if bool((nonzero & ~allowed).any()):
                return False
            touched[i] |= nonzero.flatten(0, -2).any(0)
    return all(float(t.float().mean()) > 0.8 for t in touched)


def _alike(tokens: Tensor) -> bool:
    """Whether all rows are the same."""
    return bool(torch.allclose(tokens, tokens[:1].expand_as(tokens)))


def _which_is_gate(factors: list[_Factor]) -> int:
    """0 or 1: x is linear in up and curved in gate; a ReLU gate is not curved, but x is dead where it is negative."""
    first, second = factors
    if first.curvature == second.curvature == 0:
        dead = [float((f.derivative[f.value < 0] == 0).float().mean()) for f in factors]
        return 0 if dead[0] >= dead[1] else 1
    return 0 if first.curvature >= second.curvature else 1
