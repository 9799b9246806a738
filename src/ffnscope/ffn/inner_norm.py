"""RMS norms between the activation and the down projection: narrower ones that give what the wide one gives for zeros.

A norm over d_ff channels divides by the root of their mean square, and channels that are zero count in the mean. With
K of F channels left, the mean is F / K times as large. So the weights of the channels that stay are multiplied by
sqrt(F / K), and epsilon by F / K, and every output is as before. This holds for no norm that subtracts a mean.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

EPSILONS = ("variance_epsilon", "eps")
"""Attributes by which norms hold the number that is added to the mean square."""
SIZES = (1.0, 1e-2, 1e-4)
"""Activations that a norm is tried with: where epsilon does not matter, where it does, and where it is nearly all."""


def narrow_norm_weight(weight: Tensor, d_ff: int) -> Tensor:
    """Weight [K] of a norm over K of ``d_ff`` channels, from the weight of these channels in the wide one."""
    return weight * math.sqrt(d_ff / weight.numel())


def narrow_norm_(norm: nn.Module, d_ff: int, kept: int) -> None:
    """Adapt everything but the weight of a norm over ``d_ff`` channels to ``kept`` of them, in place."""
    for name in EPSILONS:
        value = vars(norm).get(name, 0)
        if value is None:  # nn.RMSNorm: that of the dtype that it computes in
            weight = norm.get_parameter("weight")
            value = torch.finfo(torch.promote_types(weight.dtype, torch.float32)).eps
        if isinstance(value, float):
            setattr(norm, name, value * d_ff / kept)
    if vars(norm).get("normalized_shape") == (d_ff,):  # nn.RMSNorm
        vars(norm)["normalized_shape"] = (kept,)


def is_rms_norm(norm: nn.Module, d_ff: int) -> bool:
    """Whether a narrower form of a norm gives what the norm gives for zeros: tried with random weights of our own."""
    shapes = {name: tuple(p.shape) for name, p in norm.named_parameters()}
    if shapes != {"weight": (d_ff,)} or d_ff < 2 or any(True for _ in norm.buffers()):
        return False
    random = torch.Generator().manual_seed(0)
    weight, x = (torch.rand(*size, d_ff, generator=random) + 0.5 for size in ((), (len(SIZES),)))
    x *= torch.tensor(SIZES)[:, None]
    kept = torch.randperm(d_ff, generator=random)[: d_ff // 2]
    mask = torch.zeros(d_ff).index_fill_(0, kept, 1)
    wide, narrow = (_with_weight(norm, w) for w in (weight, narrow_norm_weight(weight[kept], d_ff)))
    narrow_norm_(narrow, d_ff, len(kept))
    expected, found = _run(wide, x * mask), _run(narrow, x[:, kept])
    if expected is None or found is None or expected.shape != x.shape:
        return False
    return bool((expected[:, mask == 0] == 0).all()) and torch.allclose(expected[:, kept], found, rtol=1e-4)


def _with_weight(norm: nn.Module, weight: Tensor) -> nn.Module:
    """A norm like another, with a weight of its own; the other one, offloaded perhaps, stays as it is."""
    clone = copy.copy(norm)
    vars(clone)["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
    return clone


@torch.no_grad()
def _run(norm: nn.Module, x: Tensor) -> Tensor | None:
    """Output of a norm as its class computes it, past hooks; None when it takes other arguments than a tensor."""
    try:
        found = type(norm).forward(norm, x)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None
    return found if isinstance(found, Tensor) else None
