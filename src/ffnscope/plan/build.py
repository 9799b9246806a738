"""Build a pruning plan: protection, allocation, then top-k with stable ties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.plan.allocate import target_of
from ffnscope.plan.curves import Curves
from ffnscope.plan.floors import check_names, floor_of, with_floors
from ffnscope.registry import ALLOCATORS
from ffnscope.rules import Allocator
from ffnscope.types import Budget, FFNSite, PruningPlan, Scores


def build_plan(
    scores: Scores,
    budget: Budget | float,
    allocator: str = "local",
    *,
    protected: Mapping[FFNSite, Tensor] | None = None,
    curves: Curves | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> PruningPlan:
    """Decide which channels stay.

    Args:
        scores: high = keep.
        budget: how much to remove; a number is a sparsity.
        allocator: registered rule for the widths.
        protected: site -> channels that stay whatever their score (see `top_core`). Widths are those of the scores as
            they are, but that no site keeps fewer channels than are protected in it; these take the place of the best
            others.
        curves: measured loss curves, for an allocator that reads them.
        provenance: recorded with the plan.

    Equal scores are kept in order of channel index, and of site for a global ranking, so a plan is reproducible.

    Experts that the calibration did not reach (``scores.facts["unreached"]``) are left whole: all their channels are
    protected, and the budget is for the other sites.

    Raises:
        UsageError: an impossible budget, floors that leave no room for it or that the allocator does not keep, more
            protected channels than a site keeps, or no curves for an allocator that reads them.
    """
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    check_names(scores.values, budget)
    protected = {site: torch.unique(index) for site, index in (protected or {}).items()}
    unreached = scores.facts.get("unreached", ())
    whole = {s: torch.arange(s.d_ff) for s in scores.values if s.name in unreached}
    _check_protected(scores, protected)
    counted = _without(scores, whole)
    rule = ALLOCATORS.get(allocator)
    # nothing to remove: a width that is no multiple stays as it is
    widths: dict[FFNSite, int] = {site: site.d_ff for site in counted.values}
    if budget.sparsity and widths:
        least = {site: protected[site].numel() for site in widths if site in protected}
        _check_room(counted, budget, least)
        widths = _widths(rule, counted, with_floors(budget, least) if least else budget, curves)
        _check_floors(widths, budget, least, allocator)
    kept = {s: whole[s] if s in whole else _best(v, widths[s], protected.get(s)) for s, v in scores.values.items()}
    facts = {**scores.facts, **(provenance or {})}
    return PruningPlan(kept, scores.metric, allocator, budget, {**protected, **whole}, facts)


def top_core(scores: Scores, fraction: float = 0.01, *, count: int | None = None) -> dict[FFNSite, Tensor]:
    """Return the supernode core: the highest-scoring channels of each site, as sorted indices.

    Args:
        scores: what defines the core, usually ``scar_loss_proxy``.
        fraction: share of each site's channels, in (0, 1]; rounded to the nearest count, at least 1.
        count: absolute number per site instead of a fraction.
    """
    if count is None and not 0 < fraction <= 1:
        raise UsageError(f"core fraction must be in (0, 1], the share of channels in the core; got {fraction:g}.")
    if count is not None and count < 1:
        raise UsageError(f"the core must have at least 1 channel per site; got {count}.")
    core: dict[FFNSite, Tensor] = {}
    for site, value in scores.values.items():
        size = min(count, site.d_ff) if count is not None else max(1, round(fraction * site.d_ff))
        core[site] = torch.sort(value, descending=True, stable=True).indices[:size].sort().values
    return core


def diff_plans(first: PruningPlan, second: PruningPlan) -> list[dict[str, Any]]:
    """Compare two plans site by site: widths, channels that only one keeps, and the Jaccard index of the kept sets."""
    rows: list[dict[str, Any]] = []
    for site in {**first.kept, **second.kept}:
        if site not in first.kept or site not in second.kept:
            raise UsageError(f"{site.name} is in only one of the two plans; they are of different models or sites.")
        a, b = first.mask(site), second.mask(site)
        both, either = int((a & b).sum()), int((a | b).sum())
        rows.append(
            {
                "site": site.name,
                "width_a": int(a.sum()),
                "width_b": int(b.sum()),
                "only_a": int((a & ~b).sum()),
                "only_b": int((b & ~a).sum()),
                "jaccard": both / either,
            }
        )
    return rows


def check_allocator_name(name: str) -> None:
    """Raise unless ``name`` is an allocator that needs no measured curves: for callers that have none."""
    if ALLOCATORS.get(name).needs_curves:
        raise UsageError(
            f"the allocator {name!r} needs loss curves, which are not measured here but by `ffnscope prune` and runs. "
            "Choose another allocator."
        )


def _widths(rule: Allocator, scores: Scores, budget: Budget, curves: Curves | None) -> dict[FFNSite, int]:
    if not rule.needs_curves:
        return rule.fn(scores, budget)
    if curves is None:
        raise UsageError(
            f"the allocator {rule.name!r} needs measured loss curves: pass curves=, or choose one that needs none."
        )
    return rule.fn(scores, budget, curves=curves)


def _check_room(scores: Scores, budget: Budget, protected: Mapping[FFNSite, int]) -> None:
    """Raise unless a budget leaves room for what is protected in each site, and in all."""
    step, target = budget.multiple_of, target_of(scores, budget)
    for site, count in protected.items():
        if count > site.d_ff // step * step:
            raise UsageError(
                f"{site.name} cannot keep its {count} protected channels: of {site.d_ff}, the most that is a multiple "
                f"of {step} is {site.d_ff // step * step}. Lower the core fraction or multiple_of."
            )
    floors = {site: max(floor_of(site, budget), protected.get(site, 0)) for site in scores.values}
    total, most = sum(floors.values()), max(floors, key=lambda site: floors[site])
    if protected and total > max(target, len(floors)):
        raise UsageError(
            f"a sparsity of {budget.sparsity:g} leaves {target} channels in {len(floors)} FFNs, fewer than the {total} "
            f"that are protected or of floors, the most of them in {most.name} ({floors[most]}). Lower the sparsity or "
            "the core fraction."
        )


def _check_floors(
    widths: Mapping[FFNSite, int], budget: Budget, protected: Mapping[FFNSite, int], allocator: str
) -> None:
    for site, width in widths.items():
        floor, why = max((floor_of(site, budget), "min_width, min_keep"), (protected.get(site, 0), "protected ones"))
        if width < floor:
            raise UsageError(
                f"the allocator {allocator!r} gives {site.name} {width} channels, fewer than its floor of {floor} "
                f"({why}), which it does not read. Choose another allocator, or no floors."
            )


def _without(scores: Scores, whole: Mapping[FFNSite, Tensor]) -> Scores:
    """Scores of the sites that a budget applies to."""
    return Scores(scores.metric, {s: v for s, v in scores.values.items() if s not in whole}, scores.facts)


def _check_protected(scores: Scores, protected: Mapping[FFNSite, Tensor]) -> None:
    for site, index in protected.items():
        if site not in scores.values:
            raise UsageError(f"protected channels are given for {site.name}, which has no scores.")
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= site.d_ff):
            raise UsageError(f"protected channels of {site.name} must be in [0, {site.d_ff}).")


def _best(value: Tensor, width: int, protected: Tensor | None) -> Tensor:
    """The protected channels and the best of the others, ``width`` in all, as sorted indices."""
    order = torch.sort(value, descending=True, stable=True).indices
    if protected is not None and protected.numel():
        first = torch.isin(order, protected.to(order.device))
        order = torch.cat([order[first], order[~first]])
    return order[:width].sort().values
