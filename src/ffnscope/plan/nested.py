"""Plans that remove more of what an earlier plan has left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ffnscope.plan.allocate import kept_count
from ffnscope.plan.build import build_plan
from ffnscope.types import Budget, FFNSite, PruningPlan, Scores


def round_sparsities(sparsity: float, rounds: int) -> list[float]:
    """Sparsity after each of some rounds, each of which keeps the same share of what the one before has left."""
    kept = (1 - sparsity) ** (1 / rounds)
    return [*(1 - kept**done for done in range(1, rounds)), sparsity]


def plan_within(
    scores: Scores,
    budget: Budget,
    allocator: str,
    earlier: PruningPlan,
    protected: Mapping[FFNSite, Tensor] | None = None,
) -> PruningPlan:
    """Build a plan that keeps no channel that an earlier plan has removed.

    Removed channels rank below all others, so allocators see them as the first to go. An FFN that an allocator would
    give more channels than it has left keeps these, and the others share the rest of the budget.

    Args:
        scores: of all channels, also of removed ones, whose values are not read.
        budget: of what is removed in all, the earlier plan included.
        allocator: see `build_plan`.
        earlier: for the same FFNs, with a lower sparsity.
        protected: see `build_plan`; channels that the earlier plan keeps.

    Raises:
        UsageError: see `build_plan`.
    """
    sunk = _sunk(scores, earlier)
    fixed = {site for site in scores.values if site.name in scores.facts.get("unreached", ())}
    counted = [site for site in scores.values if site not in fixed]
    total = sum(site.d_ff for site in counted)
    removed = total - kept_count(total, budget.sparsity)
    plan: PruningPlan | None = None
    share = budget.sparsity
    while free := {site: value for site, value in sunk.items() if site not in fixed}:
        stays = {site: index for site, index in (protected or {}).items() if site in free}
        asked = replace(budget, sparsity=share)
        plan = build_plan(Scores(scores.metric, free, scores.facts), asked, allocator, protected=stays)
        over = {site for site in free if plan.kept[site].numel() > earlier.kept[site].numel()}
        if not over:
            break
        fixed |= over
        gone = sum(site.d_ff - earlier.kept[site].numel() for site in counted if site in fixed)
        width = sum(site.d_ff for site in counted if site not in fixed)
        share = max(0.0, (removed - gone) / width) if width else 0.0
    found = {} if plan is None else plan.kept
    kept = {site: earlier.kept[site] if site in fixed else found[site] for site in scores.values}
    return PruningPlan(kept, scores.metric, allocator, budget, dict(protected or {}), dict(scores.facts))


def _sunk(scores: Scores, earlier: PruningPlan) -> dict[FFNSite, Tensor]:
    """Scores with those of removed channels just below the lowest of all others."""
    values = {site: value.double().clone() for site, value in scores.values.items()}
    lowest = min(float(value[earlier.kept[site].to(value.device)].min()) for site, value in values.items())
    below = torch.nextafter(torch.tensor(lowest, dtype=torch.float64), torch.tensor(-torch.inf, dtype=torch.float64))
    for site, value in values.items():
        value[earlier.removed(site).to(value.device)] = below.to(value.device)
    return values
