"""The laws of an allocator, checked on synthetic scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ffnscope.errors import ContractError, FFNScopeError
from ffnscope.plan.curves import Curves
from ffnscope.registry import ALLOCATORS
from ffnscope.rules import Allocator
from ffnscope.types import Budget, FFNSite, Scores

SPARSITIES = (0.0, 0.125, 0.25, 0.5, 0.75)
WIDTHS = (64, 64, 128, 192)
ODD_WIDTHS = (37, 50, 61, 101)


def check_allocator(allocator: str | Allocator) -> None:
    """Check that an allocator keeps the laws of its kind; silent when it does.

    The laws: one whole number per site; no site is emptied, none is given more channels than it has; widths are
    multiples of ``multiple_of`` and at least ``min_width``; the total is exactly (1 - sparsity) of all channels where
    the multiples divide it in every site, and otherwise off by at most half a multiple per site; sparsity 0 keeps
    everything; the scores are not changed; the same arguments give the same widths, whatever the global random state.

    Args:
        allocator: a registered name, or an unregistered `Allocator`.

    Raises:
        ContractError: a law is broken; the message names it, and the budget.
        UnknownNameError: no allocator of that name.
    """
    rule = ALLOCATORS.get(allocator) if isinstance(allocator, str) else allocator
    for kind in ("random", "equal", "skewed"):
        scores, odd = _scores(kind, WIDTHS), _scores(kind, ODD_WIDTHS)
        for sparsity in SPARSITIES:
            for step, least in ((1, 1), (8, 1), (8, 16), (1, 5)):
                _check_budget(rule, scores, Budget(sparsity, step, least), exact=True)
            _check_budget(rule, odd, Budget(sparsity), exact=False)
            if sparsity:
                _check_budget(rule, odd, Budget(sparsity, 8), exact=False)
        _check_repeat(rule, scores)


def _scores(kind: str, widths: tuple[int, ...]) -> Scores:
    """Random scores, equal ones (all ties), or random ones of a far higher level in each later site."""
    random = torch.Generator().manual_seed(5)
    values: dict[FFNSite, Tensor] = {}
    for i, d_ff in enumerate(widths):
        draw = torch.rand(d_ff, generator=random, dtype=torch.float64)
        value = {"random": draw, "equal": torch.ones_like(draw), "skewed": draw + 10.0 * i}[kind]
        values[FFNSite(i, f"layers.{i}.mlp", "gate", "up", "down", 8, d_ff)] = value
    return Scores(f"{kind} scores", values)


def _check_budget(rule: Allocator, scores: Scores, budget: Budget, *, exact: bool) -> None:
    found = _call(rule, scores, budget)
    if found.keys() != scores.values.keys() or not all(type(w) is int for w in found.values()):
        raise _broken(rule, "widths", "it must return one int for every site, and for no other", scores, budget)
    for site, width in found.items():
        if width < 1:
            raise _broken(rule, "no empty site", f"a site of {site.d_ff} channels keeps {width}", scores, budget)
        if width > site.d_ff:
            raise _broken(rule, "widths", f"a site of {site.d_ff} channels keeps {width}", scores, budget)
        if budget.sparsity == 0 and width != site.d_ff:
            what = f"a site of {site.d_ff} channels keeps {width}"
            raise _broken(rule, "identity at sparsity 0", what, scores, budget)
        if width < budget.min_width:
            raise _broken(rule, "min_width", f"a site keeps {width} channels", scores, budget)
        if width % budget.multiple_of:
            raise _broken(rule, "multiples", f"a site keeps {width} channels", scores, budget)
    total, kept = sum(s.d_ff for s in found), sum(found.values())
    asked = (1 - budget.sparsity) * total
    slack = 0.0 if exact else len(found) * budget.multiple_of / 2
    if abs(kept - asked) > slack:
        what = f"{kept} of {total} channels are kept; expected {asked:g}, at most {slack:g} off"
        raise _broken(rule, "exact totals", what, scores, budget)


def _check_repeat(rule: Allocator, scores: Scores) -> None:
    budget = Budget(0.5, 8)
    with torch.random.fork_rng():
        found: list[dict[FFNSite, int]] = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append(dict(_call(rule, scores, budget)))
    if found[0] != found[1]:
        what = "two calls with the same arguments gave different widths"
        raise _broken(rule, "determinism", what, scores, budget)


def _call(rule: Allocator, scores: Scores, budget: Budget) -> Mapping[FFNSite, Any]:
    before = {s: v.clone() for s, v in scores.values.items()}
    try:
        found = rule.fn(scores, budget, **({"curves": _curves(scores)} if rule.needs_curves else {}))
    except FFNScopeError as error:
        raise _broken(rule, "possible budgets", f"it raised: {error}", scores, budget) from error
    if not all(torch.equal(v, before[s]) for s, v in scores.values.items()):
        raise _broken(rule, "purity", "it changed the scores; work on a copy", scores, budget)
    return found


def _curves(scores: Scores) -> Curves:
    """Curves that fall to zero at the full width, steeper in later sites."""
    points: dict[FFNSite, tuple[Tensor, Tensor]] = {}
    for i, site in enumerate(scores.values):
        widths = torch.tensor([site.d_ff // 4, site.d_ff // 2, site.d_ff - 1])
        points[site] = widths, (1 + i) * (1 - widths / site.d_ff) ** 2
    return Curves(points, "nats per token")


def _broken(rule: Allocator, law: str, what: str, scores: Scores, budget: Budget) -> ContractError:
    asked = f"sparsity {budget.sparsity:g}, multiple_of {budget.multiple_of}, min_width {budget.min_width}"
    return ContractError(
        f"allocator {rule.name!r} breaks the law of {law}: {what.rstrip('.')} ({asked}, {scores.metric})."
    )
