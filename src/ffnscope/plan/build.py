"""Build a pruning plan: protection, allocation, then top-k with stable ties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.plan.curves import Curves
from ffnscope.plan.floors import check_names, floor_of
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
        protected: site -> channels that stay whatever their score (see `top_core`).
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
    lifted = _without(_lift(scores, protected), whole)
    rule = ALLOCATORS.get(allocator)
    # nothing to remove: a width that is no multiple stays as it is
    widths: dict[FFNSite, int] = {site: site.d_ff for site in lifted.values}
    if budget.sparsity and widths:
        widths = _widths(rule, lifted, budget, curves)
        _check_floors(widths, budget, allocator)
    kept: dict[FFNSite, Tensor] = {}
    for site, value in lifted.values.items():
        width = widths[site]
        if site in protected and width < protected[site].numel():
            raise UsageError(
                f"{site.name} keeps {width} channels at sparsity {budget.sparsity:g}, fewer than its "
                f"{protected[site].numel()} protected ones. Lower the sparsity or the core fraction."
            )
        order = torch.sort(value, descending=True, stable=True).indices
        kept[site] = order[:width].sort().values
    kept = {site: whole[site] if site in whole else kept[site] for site in scores.values}
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


def _check_floors(widths: Mapping[FFNSite, int], budget: Budget, allocator: str) -> None:
    for site, width in widths.items():
        if width < floor_of(site, budget):
            raise UsageError(
                f"the allocator {allocator!r} gives {site.name} {width} channels, fewer than its floor of "
                f"{floor_of(site, budget)} (min_width, min_keep), which it does not read. Choose another allocator, or "
                "no floors."
            )


def _without(scores: Scores, whole: Mapping[FFNSite, Tensor]) -> Scores:
    """Scores of the sites that a budget applies to."""
    return Scores(scores.metric, {s: v for s, v in scores.values.items() if s not in whole}, scores.facts)


def _lift(scores: Scores, protected: Mapping[FFNSite, Tensor]) -> Scores:
    """Raise protected channels above every score of every site, so that any allocator keeps them first."""
    unknown = [s.name for s in protected if s not in scores.values]
    if unknown:
        raise UsageError(f"protected channels are given for {unknown[0]}, which has no scores.")
    if not protected:
        return scores
    top = max(float(v.max()) for v in scores.values.values())
    above = top + max(1.0, abs(top))
    values = {s: v.double().clone() for s, v in scores.values.items()}
    for site, index in protected.items():
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= site.d_ff):
            raise UsageError(f"protected channels of {site.name} must be in [0, {site.d_ff}).")
        values[site][index] = above
    return Scores(scores.metric, values, scores.facts)
