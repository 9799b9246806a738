"""How long parts of a command would take: from shapes, and short probes of the machine's speed."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ffnscope.calibrate.forward import input_device
from ffnscope.types import FFNSite

EFFICIENCY = 0.6  # share of a bare matrix product's speed that a whole forward, or a factorisation, reaches
REFIT_SECONDS = 0.25  # least squares of a cut of 1,536 channels on a processor core; it grows with the cube
SAVE_SECONDS = 7e-9  # of a processor core per byte of a model that is read, cut, written and hashed
_SOLVES = 5  # least squares of an FFN: four dampings to choose from, and the one chosen
_PROBE = 512  # rows of the matrices that float64 is timed with


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


def sums_seconds(model: Any, sites: Sequence[FFNSite], tokens: int, speed: float) -> float:
    """Time of the sums over tokens that a sequential reconstruction fits, h h^T and (t - W h) h^T of every FFN.

    ``speed``: seconds per token of a forward. Experts of a layer share the tokens.
    """
    experts = Counter(s.layer for s in sites if s.expert is not None)
    products = sum((s.d_ff + s.d_model) * s.d_ff / (1 if s.expert is None else experts[s.layer]) for s in sites)
    return tokens * speed * products / sum(p.numel() for p in model.parameters())


def solve_seconds(model: Any, sites: Sequence[FFNSite], share: float, *, chooses: bool = True) -> float:
    """Time of the least squares of all FFNs of which this share of the channels stays, in float64; see `refitted`.

    ``chooses``: the damping is chosen on held-out tokens, so there are several.
    """
    device = input_device(model)
    a = torch.randn(_PROBE, _PROBE, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    speed = 2 * _PROBE**3 / _least(lambda: float((a @ a)[0, 0])) * EFFICIENCY
    return sum(_solve_flop(s, share, _SOLVES if chooses else 1) for s in sites) / speed


def _solve_flop(site: FFNSite, share: float, solves: int) -> float:
    """FLOP of k of n channels of width d: per solution k^3 / 3 to factor, and 4 d k^2 to divide by it and to judge."""
    n, d = site.d_ff, site.d_model
    k = math.ceil(n * share)
    missing = 2 * d * (n - k) * k * (3 if solves > 1 else 1)
    errors = 2 * d * ((n - k) ** 2 + k**2)  # without a refit, and without any channel
    return solves * (k**3 / 3 + 4 * d * k**2) + missing + errors


def _least(work: Callable[[], object]) -> float:
    """Seconds of the least disturbed of five runs."""
    times: list[float] = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
