"""A weighted combination of other metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.metrics.ranks import unit_ranks
from ffnscope.registry import METRICS, metric
from ffnscope.types import ChannelStats, FFNWeights

DEFAULT_PARTS = {"scar_loss_proxy": 1.0, "wanda": 1.0}


def parts_need(params: Mapping[str, Any]) -> tuple[str, ...]:
    """Statistics that the parts of a composite need, each once."""
    return tuple(dict.fromkeys(n for name in _checked(params.get("parts")) for n in METRICS.get(name).needed({})))


@metric("composite", needs=parts_need, source="weighted rank or z-score average")
def composite(
    stats: ChannelStats,
    weights: FFNWeights,
    *,
    parts: dict[str, float] | None = None,
    normalise: Literal["rank", "z"] = "rank",
) -> Tensor:
    """Weighted mean of other metrics' scores, each normalised inside the site; [d_ff].

    ``parts`` maps metric names to weights (not all 0), by default the loss proxy and Wanda equally; their parameters
    are the defaults. ``rank`` maps each score to its average rank in [0, 1], ``z`` subtracts the mean and divides by
    the standard deviation (0 for a constant score).
    A part that is unknown, or whose statistics were not collected, is an error: nothing is skipped.
    Invariant under up * c, down / c where its parts are, as the default ones.
    """
    found = torch.zeros(stats.site.d_ff, dtype=torch.float64)
    chosen = _checked(parts)
    total = sum(abs(w) for w in chosen.values())
    for name, weight in chosen.items():
        values = METRICS.get(name).fn(stats, weights).double().cpu()
        found += weight / total * (unit_ranks(values) if normalise == "rank" else _z_scores(values))
    return found


def _checked(parts: Mapping[str, float] | None) -> Mapping[str, float]:
    parts = DEFAULT_PARTS if parts is None else parts
    if not any(parts.values()) or not all(math.isfinite(w) for w in parts.values()):
        raise UsageError("composite needs parts: metric names with finite weights, not all 0, like {wanda: 1.0}.")
    for name in parts:
        rule = METRICS.get(name)
        if name == "composite" or rule.inputs or rule.scope != "site":
            raise UsageError(
                f"{name!r} cannot be a part of composite: it needs more than statistics and weights of a site."
            )
    return parts


def _z_scores(values: Tensor) -> Tensor:
    spread = values.std(correction=0)
    constant = float(spread) <= 1e-12 * float(values.abs().max())  # up to rounding
    return torch.zeros_like(values) if constant else (values - values.mean()) / spread
