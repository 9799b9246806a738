"""Calibration in dependency levels: what needs the supernode core comes in a second pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ffnscope.calibrate.collect import PassOptions, calibrate, join_statistics, required_statistics
from ffnscope.calibrate.windows import Windows
from ffnscope.plan.build import top_core
from ffnscope.registry import METRICS
from ffnscope.scoring import score
from ffnscope.types import ChannelStats, FFNSite

Params = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class CoreRule:
    """What the supernode core is: the top channels of each site under a metric.

    Attributes:
        metric: the metric; its own statistics need no core.
        fraction: share of each site's channels.
        count: absolute number per site instead.
        params: parameters of the metric.
    """

    metric: str = "scar_loss_proxy"
    fraction: float = 0.01
    count: int | None = None
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def find(self, model: nn.Module, stats: Mapping[FFNSite, ChannelStats]) -> dict[FFNSite, Tensor]:
        """Return the core of every site."""
        return top_core(score(model, stats, self.metric, **self.params), self.fraction, count=self.count)


def needs_core(metrics: Params) -> bool:
    """Whether any of the metrics needs the supernode core."""
    return any("core" in METRICS.get(name).inputs for name in metrics)


def first_level(metrics: Params, rule: CoreRule) -> dict[str, Mapping[str, Any]]:
    """Metrics of the first pass: all of them, and the one that defines the core where one is needed."""
    return {**metrics, rule.metric: rule.params} if needs_core(metrics) else dict(metrics)


def calibrate_all(
    model: nn.Module,
    windows: Windows,
    metrics: Params,
    *,
    sites: Sequence[FFNSite],
    options: PassOptions | None = None,
    rule: CoreRule | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> tuple[dict[FFNSite, ChannelStats], dict[FFNSite, Tensor] | None]:
    """Collect the statistics of all metrics: in one pass, or in two when a metric needs the supernode core.

    Args:
        model: a causal LM; left as it was.
        windows: calibration text.
        metrics: metric -> parameters.
        sites: FFNs to observe.
        options: sizes of the passes; the checkpoint file serves the first.
        rule: what the core is; default: the top 1 % by loss proxy.
        on_batch: called with (tokens done, tokens in all) of the pass that runs.

    Returns:
        The statistics, and the core (None when no metric needs it).
    """
    rule = rule or CoreRule()
    options = options or PassOptions()
    stats = calibrate(model, windows, first_level(metrics, rule), sites=sites, options=options, on_batch=on_batch)
    if not needs_core(metrics):
        return stats, None
    core = rule.find(model, stats)
    if required_statistics(metrics, core=True):
        second = replace(options, checkpoint=None)
        more = calibrate(model, windows, metrics, sites=sites, core=core, options=second, on_batch=on_batch)
        stats = join_statistics(stats, more)
    return stats, core
