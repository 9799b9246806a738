"""From statistics and weights to scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.errors import UsageError, unknown_name
from ffnscope.ffn.projection import weights_of
from ffnscope.registry import METRICS, Metric
from ffnscope.types import ChannelStats, FFNSite, FFNWeights, Scores


def score(
    model: nn.Module,
    stats: Mapping[FFNSite, ChannelStats] | Sequence[FFNSite],
    metric: str,
    facts: Mapping[str, Any] | None = None,
    **params: Any,
) -> Scores:
    """Score every channel with one metric; high = keep.

    Args:
        model: gives the weights; not run.
        stats: what `calibrate` returned, or only the sites for a metric that needs no text.
        metric: a registered metric.
        facts: recorded with the scores (calibration text, hashes).
        **params: the metric's own typed parameters.

    Raises:
        UnknownNameError: no such metric or parameter.
        UsageError: a statistic that the metric needs was not collected.
        NonFiniteError: a score is NaN or infinite, for example from NaN weights.
    """
    rule = METRICS.get(metric)
    for name in params:
        if name not in rule.params:
            raise unknown_name(f"parameter of metric {metric!r}", name, rule.params)
    parts = stats if isinstance(stats, Mapping) else {s: ChannelStats(s, {}, {}, {}) for s in stats}
    if not parts:
        raise UsageError("there is no FFN site to score.")
    values = {site: _values(rule, part, weights_of(model, site), params) for site, part in parts.items()}
    defaults = {k: p.default for k, p in rule.params.items()}
    return Scores(metric, values, {"params": {**defaults, **params}, "source": rule.source, **(facts or {})})


def _values(rule: Metric, stats: ChannelStats, weights: FFNWeights, params: Mapping[str, Any]) -> Tensor:
    """Run one metric with statistics and weights on one device; [d_ff] float64 on the CPU."""
    device = weights.down.device
    if device.type == "mps":  # no float64 there
        tensors: list[Any] = [getattr(weights, f.name) for f in fields(weights)]
        resident: list[Any] = [None if t is None else t.cpu() for t in tensors]
        weights = FFNWeights(*resident)
    else:
        moved = {k: v.to(device) for k, v in stats.values.items()}
        stats = ChannelStats(stats.site, moved, stats.counts, stats.reductions)
    with torch.no_grad():
        return rule.fn(stats, weights, **params).double().cpu()
