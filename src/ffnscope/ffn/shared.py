"""FFNs of several layers that hold the same weights: one site where they share all, refused where they share some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ffnscope.ffn.offload import is_offloaded
from ffnscope.ffn.projection import modules_of, uses_of
from ffnscope.types import FFNSite


def merge_shared(model: nn.Module, sites: Sequence[FFNSite]) -> tuple[list[FFNSite], dict[str, str]]:
    """Make one site of dense FFNs that hold the same parameters, the first with the others as ``twins``.

    Experts that are modules stay as they are; they are refused when they share a weight with anything else.

    Returns:
        the sites; and path of a down projection -> why it cannot be cut, for FFNs that share only some weights: they
        cannot lose different channels, and masking one would change the other.
    """
    weights = _same_weights(model)
    groups: dict[object, list[FFNSite]] = {}
    for site in sites:
        alone = None if site.expert is None else site.path
        names = (alone, site.gate, site.up, site.down, site.norm, site.fused, site.runs)
        groups.setdefault((names, _held(weights, replace(site, adapters=()))), []).append(site)
    merged = [one for group in groups.values() for one in _merged(weights, group)]
    refused = dict(_partly_shared(weights, merged))
    return [s for s in merged if s.projections[-1] not in refused], refused


def _merged(weights: Mapping[str, str], group: Sequence[FFNSite]) -> list[FFNSite]:
    """One site for all, with the adapters of each use; the group as it is when its adapters are not shared."""
    adapters = tuple(dict.fromkeys(name for site in group for name in site.adapters))
    whole = [replace(site, adapters=adapters) for site in group]
    if len({_held(weights, site) for site in whole}) > 1:
        return list(group)
    return [replace(whole[0], twins=tuple(site.path for site in whole[1:]))]


def _held(weights: Mapping[str, str], site: FFNSite) -> tuple[str | None, ...]:
    """The parameters of a site, each by one name; None for one that is missing."""
    return tuple(weights.get(f"{name}.{leaf}") for name in modules_of(site) for leaf in ("weight", "bias"))


def _same_weights(model: Any) -> dict[str, str]:
    """Name of every parameter -> the first of the names that the same parameter has.

    Offloaded parameters are different objects, and empty; there the model tells which are tied.
    """
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, parameter in parameters.items():
        source = tied.get(name, name)
        offloaded = any(is_offloaded(p) for p in (parameter, parameters.get(source, parameter)))
        found[name] = first.setdefault(id(parameter), source if offloaded else name)
    return found


def _partly_shared(weights: Mapping[str, str], sites: Sequence[FFNSite]) -> Iterator[tuple[str, str]]:
    owners: dict[str, list[FFNSite]] = {}
    for site in sites:
        for weight in dict.fromkeys(w for w in _held(weights, site) if w is not None):
            owners.setdefault(weight, []).append(site)
    for group in owners.values():
        for site in group if len(group) > 1 else ():
            others = ", ".join(s.projections[-1] for s in group if s is not site)
            for use in uses_of(site):
                yield use.projections[-1], f"it shares its weights with {others}"
