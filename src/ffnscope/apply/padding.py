"""Keep some removed channels, their weights zeroed: widths that a checkpoint can be loaded with, computing the same."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.apply.expert_slice import width_step
from ffnscope.apply.widths import Shape, changed_config, shapes_of, stock_model, width_fields
from ffnscope.ffn.expert_calls import group_experts, stored_together
from ffnscope.ffn.offload import materialised
from ffnscope.ffn.projection import coupled
from ffnscope.ffn.survey import survey
from ffnscope.types import FFNSite, PruningPlan

Widths = Mapping[FFNSite, int]


def pad_(model: nn.Module, plan: PruningPlan, widths: Widths) -> PruningPlan:
    """Zero removed channels in place until every site has its width, and return the plan that keeps them too."""
    surplus = _surplus(plan, widths)
    for sites in stored_together(surplus):
        with torch.no_grad(), materialised(model, sites[0], write=True):
            for site in sites:
                for entry in coupled(model, site, surplus[site]):
                    entry.parameter.index_fill_(entry.axis, entry.index.to(entry.parameter.device), 0)
    return padded_plan(plan, widths)


def padded_plan(plan: PruningPlan, widths: Widths) -> PruningPlan:
    """The plan that keeps removed channels too, until every site has its width."""
    kept: dict[FFNSite, Tensor] = dict(plan.kept)
    for site, extra in _surplus(plan, widths).items():
        kept[site] = torch.cat([kept[site], extra]).sort().values
    return PruningPlan(kept, plan.metric, plan.allocator, plan.budget, plan.protected, plan.provenance)


def _surplus(plan: PruningPlan, widths: Widths) -> dict[FFNSite, Tensor]:
    surplus = {s: plan.removed(s)[: widths[s] - index.numel()] for s, index in plan.kept.items() if s in widths}
    return {s: index for s, index in surplus.items() if index.numel()}


def widest_widths(model: nn.Module, plan: PruningPlan) -> dict[FFNSite, int]:
    """Width of every planned site: the widest kept one of all sites (of the plan or not) that had its width before."""
    planned = {site.name for site in plan.kept}
    widest = {site.d_ff: site.d_ff for site in survey(model).sites if site.name not in planned}
    for site, width in plan.widths.items():
        widest[site.d_ff] = max(width, widest.get(site.d_ff, 0))
    return {site: widest[site.d_ff] for site in plan.kept}


def zeroed_channels(model: nn.Module, plan: PruningPlan) -> int:
    """How many channels that a plan removes a pruned model still holds, as zeros (see `prune_`)."""
    return zeroed_among({site.name: site.d_ff for site in survey(model).sites}, plan)


def zeroed_among(found: Mapping[str, int], plan: PruningPlan) -> int:
    """The same from the widths of a pruned model's FFNs by name."""
    return sum(max(0, found.get(site.name, width) - width) for site, width in plan.widths.items())


@dataclass(frozen=True, slots=True)
class _Unit:
    """FFNs that have one width: a dense one, or the experts of one layer, whose width is a multiple of ``step``."""

    sites: tuple[FFNSite, ...]
    down: str
    asked: int
    step: int = 1

    @property
    def d_ff(self) -> int:
        return self.sites[0].d_ff


def field_widths(model: nn.Module, plan: PruningPlan, *, any_surplus: bool = False) -> dict[FFNSite, int]:
    """Widths that differ from the plan's, so that FFNs which one config field drives shrink by the same share.

    A field may set the width of routed and shared experts, or of experts and dense layers. The plan's widths then miss
    each other by rounding: 42 of 56 channels, but 44 for the grouped kernel, while 84 of 112 would need 42. The field's
    next value that all of them fit into is taken. Which field drives what is found by building the class from a changed
    config on the meta device.

    Args:
        model: not yet cut.
        plan: what to keep.
        any_surplus: also where more than rounding is missing, as for a plan of different widths.

    Warns:
        UserWarning: channels stay in the model with weights of zero.
    """
    if len({s.d_ff for s in plan.kept}) == 1 and not group_experts(plan.kept):
        return {}
    units = _units(model, plan)
    config: Any = model.config
    built, shapes = stock_model(model, config), shapes_of(model)
    if built is None or shapes_of(built) != shapes:
        return {}
    widths: dict[FFNSite, int] = {}
    for path, value, trial in _trials(config, units):
        changed = changed_config(config, {path: trial})
        narrower = None if changed is None else stock_model(model, changed)
        driven = [] if narrower is None else _driven(shapes, shapes_of(narrower), units, Fraction(trial, value))
        new = _field_value(driven, value, any_surplus)
        alike = len({(u.d_ff, u.asked, u.step) for u in driven}) < 2
        for unit in driven if new is not None and not alike else ():
            widths |= {s: max(unit.d_ff * (new or 0) // value, widths.get(s, 0)) for s in unit.sites}
    _tell(plan, widths)
    return widths


def _units(model: nn.Module, plan: PruningPlan) -> list[_Unit]:
    """All FFNs of the model, those that the plan leaves out included."""
    sites = {s.name: s for s in survey(model).sites} | {s.name: s for s in plan.kept}
    asked = {s: plan.kept[s].numel() if s in plan.kept else s.d_ff for s in sites.values()}
    units = [_Unit((s,), f"{s.projections[-1]}.weight", w) for s, w in asked.items() if not s.stacked]
    for experts, members in group_experts(asked).items():
        step = width_step(model.get_submodule(experts.path), experts)
        every = tuple(members.values())
        units.append(_Unit(every, f"{experts.path}.{experts.down}", max(asked[s] for s in every), step))
    return units


def _trials(config: Any, units: Sequence[_Unit]) -> Iterator[tuple[str, int, int]]:
    """Config fields that may hold a width, each with its value and a smaller one to try."""
    for path, value in width_fields(config):
        if type(value) is not int or value < 1:
            continue
        for unit in units:
            related = unit.d_ff % value == 0 or value % unit.d_ff == 0
            if unit.asked < unit.d_ff and related and value * unit.asked % unit.d_ff == 0:
                yield path, value, value * unit.asked // unit.d_ff
                break


def _driven(
    built: Mapping[str, Shape], narrower: Mapping[str, Shape], units: Sequence[_Unit], share: Fraction
) -> list[_Unit]:
    """Units that became narrower; none when one of them did by another share than the field, or others came or went."""
    if built.keys() != narrower.keys():
        return []
    shares = {u: Fraction(math.prod(narrower[u.down]), math.prod(built[u.down])) for u in units}
    driven = [u for u in units if shares[u] != 1]
    return driven if all(shares[u] == share for u in driven) else []


def _field_value(driven: Sequence[_Unit], value: int, any_surplus: bool) -> int | None:
    """Least value of a field that all units fit into; None when that keeps more than rounding explains."""
    factors = {u: Fraction(u.d_ff, value) for u in driven}
    step = max((u.step for u in driven), default=1)
    least = max((math.ceil(u.asked / f) for u, f in factors.items()), default=value)
    for new in range(least, value):
        widths = {u: f * new for u, f in factors.items()}
        if all(w.denominator == 1 and w % u.step == 0 for u, w in widths.items()):
            one_share = len({(u.d_ff, u.asked) for u in driven}) == len({u.d_ff for u in driven})
            rounding = one_share and all(w - u.asked <= max(factors[u], 1) * step for u, w in widths.items())
            return new if rounding or any_surplus else None
    return None


def _tell(plan: PruningPlan, widths: Widths) -> None:
    wider = {s: widths[s] - index.numel() for s, index in plan.kept.items() if widths.get(s, 0) > index.numel()}
    if not wider:
        return
    site = next(iter(wider))
    warnings.warn(
        f"one config field sets the widths of several kinds of FFN, so that they can only shrink by the same share; "
        f"{sum(wider.values())} removed channels in {len(wider)} FFNs are zeroed instead of cut ({site.name}: width "
        f"{widths[site]}, {wider[site]} zeroed).",
        stacklevel=4,
    )
