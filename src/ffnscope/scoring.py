"""From statistics and weights to scores."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.errors import NonFiniteError, UsageError, unknown_name
from ffnscope.ffn.graph import decoder_graph
from ffnscope.ffn.offload import materialised, named_values
from ffnscope.ffn.projection import weights_of
from ffnscope.graph import DecoderGraph
from ffnscope.registry import METRICS
from ffnscope.rules import Metric
from ffnscope.types import ChannelStats, FFNSite, FFNWeights, Scores, check_core


def score(
    model: nn.Module,
    stats: Mapping[FFNSite, ChannelStats] | Sequence[FFNSite],
    metric: str,
    facts: Mapping[str, Any] | None = None,
    *,
    core: Mapping[FFNSite, Tensor] | None = None,
    reference: nn.Module | None = None,
    background: Mapping[FFNSite, ChannelStats] | None = None,
    **params: Any,
) -> Scores:
    """Score every channel with one metric; high = keep.

    An expert that no token of the calibration reached has no scores: its channels get 0, it is named in the facts under
    ``unreached`` and in a `UserWarning`, and `build_plan` leaves it whole.

    Args:
        model: gives the weights; not run.
        stats: what `calibrate` returned, or only the sites for a metric that needs no text.
        metric: a registered metric.
        facts: recorded with the scores (calibration text, hashes).
        core: supernode core per site, for a metric that needs it (see `top_core`).
        reference: the model before fine-tuning, for a metric that needs it.
        background: what `calibrate` returned on another text, for a metric that compares the two.
        **params: the metric's own typed parameters.

    Raises:
        UnknownNameError: no such metric or parameter.
        UsageError: a statistic that the metric needs was not collected, or the core or reference that it needs was not
            given or is of another shape.
        NonFiniteError: a score is NaN or infinite; a weight that is the cause is named.
    """
    rule = METRICS.get(metric)
    for name in params:
        if name not in rule.params:
            raise unknown_name(f"parameter of metric {metric!r}", name, rule.params)
    every = stats if isinstance(stats, Mapping) else {s: ChannelStats(s, {}, {}, {}) for s in stats}
    parts = {site: part for site, part in every.items() if site.role == "ffn"}
    if not parts:
        raise UsageError("there is no FFN site to score.")
    unreached = _unreached(rule, parts, params)
    graph = None
    with naming_weights(model):
        if rule.scope == "model":
            graph = decoder_graph(model, list(parts))
            _warn_of_missing(rule, graph)
            extra = {"background": background} if "background" in rule.inputs else {}
            found = _model_values(rule, graph, every, {**params, **extra})
        else:
            reached = [site for site in parts if site.name not in unreached]
            found = {site: _site_values(rule, model, parts[site], core, reference, params) for site in reached}
    none = {site: torch.zeros(site.d_ff, dtype=torch.float64) for site in parts if site.name in unreached}
    values = {site: none[site] if site in none else found[site] for site in parts}
    defaults = {k: p.default for k, p in rule.params.items() if p.default is not p.empty}
    known = {"params": {**defaults, **params}, "source": rule.source, **(facts or {})}
    if graph is not None and graph.missing:
        known["not_in_graph"] = list(graph.missing)
    with naming_weights(model):
        return Scores(metric, values, {**known, "unreached": unreached} if unreached else known)


@contextlib.contextmanager
def naming_weights(model: nn.Module) -> Generator[None]:
    """Within the block, a NonFiniteError also names the weight of the model that is not finite, if there is one."""
    try:
        yield
    except NonFiniteError as error:
        name = not_finite_weight(model)
        if name is None or name in str(error):
            raise
        raise NonFiniteError(
            f"{error} The weight {name} holds NaN or infinity: load the model again from an intact checkpoint."
        ) from error


def not_finite_weight(model: nn.Module) -> str | None:
    """Name of the first weight that holds NaN or infinity, or None; offloaded weights are read too.

    Buffers do not count: infinity in them may be meant, such as the open bounds of Gemma 4's clipped projections.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in named_values(model):
        if name in parameters and not bool(torch.isfinite(value.detach()).all()):
            return name
    return None


def _unreached(rule: Metric, parts: Mapping[FFNSite, ChannelStats], params: Mapping[str, Any]) -> list[str]:
    """Names of experts that have no token in a statistic that the metric needs, with a warning."""
    needs = rule.needed(params)
    found = [s.name for s, p in parts.items() if s.expert is not None and any(p.counts.get(n) == 0 for n in needs)]
    if found:
        warn_unreached(rule.name, found, list(parts), stacklevel=4)
    return found


def warn_unreached(metric: str, found: Sequence[str], sites: Sequence[FFNSite], *, stacklevel: int) -> None:
    """Warn that the experts named in ``found`` have no scores."""
    experts = sum(site.expert is not None for site in sites)
    warnings.warn(
        f"{len(found)} of {experts} experts were reached by no calibration token ({', '.join(found[:3])}"
        f"{', ...' if len(found) > 3 else ''}), so {metric} cannot rank their channels. Plans leave them whole; "
        "calibrate on more or other text to rank them.",
        stacklevel=stacklevel,
    )


def _input(
    rule: Metric, name: str, site: FFNSite, core: Mapping[FFNSite, Tensor] | None, reference: nn.Module | None
) -> Any:
    """Fetch what a metric needs beyond statistics and weights, for one site."""
    if name == "core":
        if core is None or site not in core:
            raise UsageError(
                f"metric {rule.name!r} needs the supernode core of {site.name}: pass core=top_core(scores of "
                "scar_loss_proxy)."
            )
        check_core(site, core[site])
        return core[site]
    if reference is None:
        raise UsageError(
            f"metric {rule.name!r} needs the model before fine-tuning: set model.reference_id, or pass reference=."
        )
    return _reference_weights(reference, site)


def check_reference(reference: nn.Module, sites: Sequence[FFNSite]) -> None:
    """Raise UsageError unless the reference model has the sites of the scored one, in the same shapes."""
    for site in sites:
        _reference_weights(reference, site)


def _reference_weights(reference: nn.Module, site: FFNSite) -> FFNWeights:
    with materialised(reference, site):
        weights = weights_of(reference, site)
    if weights.up.shape != (site.d_ff, site.d_model):
        raise UsageError(
            f"the reference model has {tuple(weights.up.shape)} at {site.name}; expected {(site.d_ff, site.d_model)}. "
            "It must be the same architecture before fine-tuning."
        )
    return weights


def _site_values(
    rule: Metric,
    model: nn.Module,
    stats: ChannelStats,
    core: Mapping[FFNSite, Tensor] | None,
    reference: nn.Module | None,
    params: Mapping[str, Any],
) -> Tensor:
    """Run a metric of scope "site" on one site; [d_ff] float64 on the CPU."""
    site = stats.site
    extra = {name: _input(rule, name, site, core, reference) for name in rule.inputs}
    with materialised(model, site):
        return _values(rule, stats, weights_of(model, site), {**params, **extra})


def _warn_of_missing(rule: Metric, graph: DecoderGraph) -> None:
    if graph.missing:
        first, *others = graph.missing
        more = f" (and {len(others)} more)" if others else ""
        warnings.warn(f"{rule.name} does not see all of the model: {first}{more}.", stacklevel=3)


def _model_values(
    rule: Metric, graph: DecoderGraph, stats: Mapping[FFNSite, ChannelStats], params: Mapping[str, Any]
) -> dict[FFNSite, Tensor]:
    """Run a metric of scope "model"; site -> [d_ff] float64 on the CPU."""
    with torch.no_grad():
        found: Mapping[FFNSite, Tensor] = rule.fn(graph, stats, **params)
    if set(found) != set(graph.sites):
        names = sorted({site.name for site in found} ^ {site.name for site in graph.sites})
        raise UsageError(
            f"metric {rule.name!r} has scope 'model' and must return one vector for each of the {len(graph.sites)} "
            f"sites of its graph; it returned {len(found)}, and {names[0]} is in only one of the two."
        )
    return {site: value.double().cpu() for site, value in found.items()}


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
