"""Calibration in dependency levels: what needs the supernode core comes in a second pass, or is cut down to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.analyze.group_sums import with_core
from ffnscope.calibrate.collect import PassOptions, calibrate, collect, join_statistics, required_statistics
from ffnscope.calibrate.memory import statistics_bytes
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.plan.build import top_core
from ffnscope.registry import METRICS, STATISTICS
from ffnscope.scoring import score
from ffnscope.types import ChannelStats, FFNSite

Params = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Extra:
    """What a calibration takes beyond what its metrics need.

    Attributes:
        statistics: names; those that read the core are taken for its channels and ``pool`` others.
        pool: channels beside the core, for null cores (`ffnscope.analyze.neighbours.null_channels`).
        n_documents: groups of documents, for statistics by document.
    """

    statistics: tuple[str, ...] = ()
    pool: int = 0
    n_documents: int = 0


NOTHING = Extra()


@dataclass(frozen=True, slots=True)
class CoreRule:
    """What the supernode core is: the top channels of each site under a metric.

    Attributes:
        metric: the metric; its own statistics need no core.
        fraction: share of each site's channels.
        count: absolute number per site instead.
        params: parameters of the metric.

    Raises:
        UsageError: a fraction outside (0, 1], or a count below 1.
    """

    metric: str = "scar_loss_proxy"
    fraction: float = 0.01
    count: int | None = None
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.count is None and not 0 < self.fraction <= 1:
            raise UsageError(
                f"core fraction must be in (0, 1], the share of channels in the core; got {self.fraction:g}."
            )
        if self.count is not None and self.count < 1:
            raise UsageError(f"the core must have at least 1 channel per site; got {self.count}.")

    def size(self, sites: Sequence[FFNSite]) -> int:
        """Channels of the core of the widest site."""
        return self.count or max(1, round(self.fraction * max(site.d_ff for site in sites)))

    def find(self, model: nn.Module, stats: Mapping[FFNSite, ChannelStats]) -> dict[FFNSite, Tensor]:
        """Return the core of every site."""
        return top_core(score(model, stats, self.metric, **self.params), self.fraction, count=self.count)


def needs_core(metrics: Params) -> bool:
    """Whether any of the metrics needs the supernode core."""
    return any("core" in METRICS.get(name).inputs for name in metrics)


def first_level(metrics: Params, rule: CoreRule) -> dict[str, Mapping[str, Any]]:
    """Metrics of the first pass: all of them, and the one that defines the core where one is needed.

    Raises:
        UsageError: the metric that defines the core itself needs a core or a reference; or it is asked for with other
            parameters, for which it needs other statistics.
    """
    if not needs_core(metrics):
        return dict(metrics)
    defines = METRICS.get(rule.metric)
    if defines.inputs:
        raise UsageError(
            f"{rule.metric!r} cannot define the core, because it itself needs the {defines.inputs[0]}; take a metric "
            "without, such as scar_loss_proxy."
        )
    asked = metrics.get(rule.metric, rule.params)
    if set(defines.needed(asked)) != set(defines.needed(rule.params)):
        raise UsageError(
            f"{rule.metric!r} is asked for with other parameters than those by which it defines the core; give it the "
            "same ones, or define the core by another metric."
        )
    return {**metrics, rule.metric: asked}


def level_statistics(metrics: Params, rule: CoreRule, extra: Extra = NOTHING) -> tuple[list[str], list[str]]:
    """Statistics that need no core, and those that need it; each once."""
    level = first_level(metrics, rule)
    first, second = (required_statistics(level, core=core) for core in (False, True))
    for name in extra.statistics:
        chosen = second if STATISTICS.get(name).needs_core else first
        chosen += [] if name in chosen else [name]
    return first, second


def takes_one_pass(
    sites: Sequence[FFNSite], metrics: Params, options: PassOptions | None = None, extra: Extra = NOTHING
) -> bool:
    """Whether the first pass takes what needs the core for every channel, which spares the second pass.

    Once the core is known, its part is picked (see `Statistic`). That needs a [d_ff, d_ff] sum per site where a second
    pass needs [core, d_ff], and is done as long as these take at most ``options.one_pass_bytes`` in all.
    """
    names = list(required_statistics(metrics, core=True))
    names += [n for n in extra.statistics if STATISTICS.get(n).needs_core and n not in names]
    if not names or not all("core" in STATISTICS.get(name).shape for name in names):
        return False
    return statistics_bytes(sites, names, None) <= (options or PassOptions()).one_pass_bytes


def calibration_passes(
    sites: Sequence[FFNSite],
    metrics: Params,
    rule: CoreRule,
    options: PassOptions | None = None,
    extra: Extra = NOTHING,
) -> list[list[str]]:
    """Statistics of each pass that `calibrate_all` makes with the same arguments: one or two lists, or an empty one."""
    first, second = level_statistics(metrics, rule, extra)
    if takes_one_pass(sites, metrics, options, extra):
        return [[*required_statistics(first_level(metrics, rule)), *_beyond(metrics, rule, extra)]]
    return [first, second] if second else [first]


def _beyond(metrics: Params, rule: CoreRule, extra: Extra) -> list[str]:
    known = required_statistics(first_level(metrics, rule))
    return [name for name in extra.statistics if name not in known]


def calibrate_at_once(
    model: nn.Module,
    windows: Windows,
    metrics: Params,
    *,
    sites: Sequence[FFNSite],
    rule: CoreRule,
    options: PassOptions | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> tuple[dict[FFNSite, ChannelStats], dict[FFNSite, Tensor]]:
    """Collect in one pass the statistics of metrics that need the core, for every channel; then cut them down to it.

    See `calibrate_all` for the arguments, and `takes_one_pass` for the memory.
    """
    every = {site: torch.arange(site.d_ff) for site in sites}
    names = required_statistics(first_level(metrics, rule))
    stats = collect(model, windows, names, sites=sites, core=every, options=options, on_batch=on_batch)
    core = rule.find(model, stats)
    return with_core(stats, every, core), core


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

    Also with a core it is one pass where the memory allows it (see `takes_one_pass`): the sums are the same.

    Args:
        model: a causal LM; left as it was.
        windows: calibration text.
        metrics: metric -> parameters.
        sites: FFNs to observe.
        options: sizes of the passes. The checkpoint file serves the first; the second has its own beside it, of the
            same name with ``core_`` before.
        rule: what the core is; default: the top 1 % by loss proxy.
        on_batch: called with (tokens done, tokens in all) of the pass that runs.

    Returns:
        The statistics, and the core (None when no metric needs it).

    Raises:
        UsageError: the rule cannot define a core (see `first_level`).
        NonFiniteError, DeviceError: see `calibrate`.
    """
    rule = rule or CoreRule()
    options = options or PassOptions()
    if takes_one_pass(sites, metrics, options):
        return calibrate_at_once(model, windows, metrics, sites=sites, rule=rule, options=options, on_batch=on_batch)
    stats = calibrate(model, windows, first_level(metrics, rule), sites=sites, options=options, on_batch=on_batch)
    if not needs_core(metrics):
        return stats, None
    core = rule.find(model, stats)
    if required_statistics(metrics, core=True):
        path = options.checkpoint
        second = replace(options, checkpoint=path.with_name(f"core_{path.name}") if path else None)
        more = calibrate(model, windows, metrics, sites=sites, core=core, options=second, on_batch=on_batch)
        stats = join_statistics(stats, more)
    return stats, core
