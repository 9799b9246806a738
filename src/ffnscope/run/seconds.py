"""How long parts of a command would take: from shapes, and short probes of the machine's speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ffnscope.calibrate.forward import input_device
from ffnscope.types import FFNSite

EFFICIENCY = 0.6  # share of a bare matrix product's speed that a whole forward, or a factorisation, reaches
SAVE_SECONDS = 7e-9  # of a processor core per byte of a model that is read, cut, written and hashed


def seconds_per_token(model: Any, sites: Sequence[FFNSite]) -> float:
    """Time of one token's forward: 2 FLOP per weight at the measured speed of a matrix product of the FFN's shape."""
    device, dtype = input_device(model), next(p.dtype for p in model.parameters() if p.dim() == 2)
    a = torch.randn(1024, sites[0].d_model, device=device, dtype=dtype)
    b = torch.randn(sites[0].d_model, sites[0].d_ff, device=device, dtype=dtype)
    speed = 2 * a.shape[0] * b.numel() / _least(lambda: float((a @ b)[0, 0]))
    return 2 * sum(p.numel() for p in model.parameters()) / (speed * EFFICIENCY)


def distillation_seconds(model: Any, sites: Sequence[FFNSite], tokens: int, speed: float) -> float:
    """Time of an epoch over ``tokens`` in every FFN, none of them cut: forward and backward take three forwards.

    ``speed``: seconds per token of a forward.
    """
    trained = sum((2 if s.gate is None else 3) * s.d_ff * s.d_model for s in sites)
    return 3 * tokens * speed * trained / sum(p.numel() for p in model.parameters())


def _least(work: Callable[[], object]) -> float:
    """Seconds of the least disturbed of five runs."""
    times: list[float] = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
