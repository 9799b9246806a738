"""Time of the dense linear algebra of a pruning, from shapes: second moments, orders of removal, least squares.

It grows with d_ff^2 per token and with d_ff^3 per FFN, so that in wide FFNs it takes longer than the forwards.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ffnscope.analyze.measured import CurveRounds, curve_cuts
from ffnscope.apply.method import Method
from ffnscope.apply.refit import DAMPING, DAMPINGS
from ffnscope.calibrate.collect import required_statistics
from ffnscope.calibrate.forward import input_device
from ffnscope.run.lines import Line, with_more
from ffnscope.types import FFNSite

EFFICIENCY = 0.6  # share of a bare matrix product's speed that factorisations and panels reach
MOMENTS = "h_outer"
_PROBE = 768


def seconds_per_operation(model: Any) -> float:
    """Time of one of the two operations of a multiply-add in float64, by a product of matrices."""
    device = input_device(model)
    one = torch.randn(_PROBE, _PROBE, device="cpu" if device.type == "mps" else device, dtype=torch.float64)
    times: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        float((one @ one)[0, 0])
        times.append(time.perf_counter() - start)
    return min(times) / (2 * _PROBE**3 * EFFICIENCY)


def moment_operations(sites: Sequence[FFNSite], n_tokens: int, statistics: Iterable[str] = (MOMENTS,)) -> float:
    """Operations of the sums of h h^T over so many tokens; 0 where the statistics are others.

    Half of each is computed, in the dtype of the model, which takes half of the time of float64.
    """
    return sum(0.5 * n_tokens * _tokens(site, sites) * site.d_ff**2 for site in sites) if MOMENTS in statistics else 0.0


def _cross_operations(sites: Sequence[FFNSite], n_tokens: int) -> float:
    """Operations of the sums (t - W h) h^T that a sequential reconstruction fits to, in the dtype of the model."""
    return sum(1.0 * n_tokens * _tokens(site, sites) * site.d_model * site.d_ff for site in sites)


def _tokens(site: FFNSite, sites: Sequence[FFNSite]) -> float:
    """Share of the tokens that reaches an FFN: experts of a layer share them."""
    return 1.0 if site.expert is None else 1.0 / sum(s.layer == site.layer and s.expert is not None for s in sites)


def order_operations(sites: Sequence[FFNSite], metric: str) -> float:
    """Operations of a metric that inverts the second moment of every FFN and orders its channels; 0 for others."""
    if MOMENTS not in required_statistics([metric]):
        return 0.0
    return sum(4.0 * site.d_ff**3 + 2.0 * site.d_model * site.d_ff * (site.d_model + site.d_ff) for site in sites)


def refit_operations(sites: Sequence[FFNSite], method: Method, density: float, n_tokens: int) -> float:
    """Operations of the least squares of every FFN, with each damping that is tried, and of its own sums."""
    if not method.refits:
        return 0.0
    tried = len(DAMPINGS) if method.damping is None else 0
    solves = 0.0
    for site in sites:
        kept = max(1.0, density * site.d_ff)
        both = 2.0 * kept**2 * site.d_model
        lost = 4.0 * (site.d_ff - kept) * site.d_ff * site.d_model
        solves += (tried + 1) * (kept**3 / 3 + both) + tried * both + lost
    if method.reconstruct == "sequential":
        solves += moment_operations(sites, n_tokens) + _cross_operations(sites, n_tokens)
    return solves


def curve_operations(sites: Sequence[FFNSite], rounds: CurveRounds) -> float:
    """Operations of the least squares of every cut of measured loss curves, each with one damping.

    Of a further round, the three widths and the solution that is measured around count as the first round's on average.
    """
    method, shares = Method(reconstruct="one_shot", damping=DAMPING), rounds.options.shares
    mean = sum(refit_operations(sites, method, share, 0) for share in shares) / (len(shares) * len(sites))
    return curve_cuts(sites, rounds) * mean


def score_line(what: str, sites: Sequence[FFNSite], metrics: Sequence[str], operation: float) -> Line:
    """Tell the scoring: seconds, but for metrics that order the channels by the inverse of their second moment."""
    return with_more(Line("score", what), operation * sum(order_operations(sites, name) for name in metrics))
