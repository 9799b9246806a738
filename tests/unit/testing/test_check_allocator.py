"""Each law of allocators can fail: one bad allocator per law."""

from __future__ import annotations

import pytest
import torch

from ffnscope.errors import ContractError, UnknownNameError, UsageError
from ffnscope.plan.allocate import local
from ffnscope.rules import Allocator
from ffnscope.testing import check_allocator
from ffnscope.types import Budget


def rule(fn):
    return Allocator("mine", fn, "A made-up allocator.")


def good(scores, budget):
    return local(scores, budget)


def floats(scores, budget):
    return {s: float(w) for s, w in local(scores, budget).items()}


def forgets_a_site(scores, budget):
    return dict(list(local(scores, budget).items())[1:])


def empties_a_site(scores, budget):
    widths = local(scores, budget)
    if budget.sparsity == 0.75:
        first, second, *_ = widths
        widths[second] += widths[first]
        widths[first] = 0
    return widths


def too_wide(scores, budget):
    return {s: w + 8 for s, w in local(scores, budget).items()}


def never_everything(scores, budget):
    return {s: w - 8 * (w == s.d_ff) for s, w in local(scores, budget).items()}


def ignores_min_width(scores, budget):
    widths = local(scores, budget)
    if budget.min_width > 1 and budget.sparsity == 0.75:
        first, *_, last = widths
        widths[last] += widths[first] - budget.min_width + 1
        widths[first] = budget.min_width - 1
    return widths


def ignores_multiples(scores, budget):
    widths = local(scores, budget)
    if budget.sparsity:
        first, *_, last = widths
        widths[first], widths[last] = widths[first] - 1, widths[last] + 1
    return widths


def keeps_more(scores, budget):
    return {
        s: min(w + budget.multiple_of, s.d_ff - s.d_ff % budget.multiple_of) for s, w in local(scores, budget).items()
    }


def refuses(scores, budget):
    raise UsageError("not today.")


def random_widths(scores, budget):
    widths = local(scores, budget)
    *_, third, fourth = widths
    if budget == Budget(0.5, 8):
        move = 8 * int(torch.randint(0, 3, ()))  # whatever comes, every other law is kept
        widths[third], widths[fourth] = widths[third] + move, widths[fourth] - move
    return widths


def changes_scores(scores, budget):
    for value in scores.values.values():
        value.neg_()
    return local(scores, budget)


def flattens_scores(scores, budget):
    for value in scores.values.values():
        value.zero_()
    return local(scores, budget)


BAD = [
    (floats, "widths: it must return one int"),
    (forgets_a_site, "widths: it must return one int"),
    (empties_a_site, "no empty site"),
    (too_wide, "widths: a site of 64 channels keeps 72"),
    (never_everything, "identity at sparsity 0"),
    (ignores_min_width, "min_width"),
    (ignores_multiples, "multiples"),
    (keeps_more, "exact totals"),
    (refuses, "possible budgets: it raised: not today"),
    (random_widths, "determinism"),
    (changes_scores, "purity"),
    (flattens_scores, "purity"),
]


@pytest.mark.parametrize(("fn", "law"), BAD, ids=lambda v: getattr(v, "__name__", ""))
def test_a_bad_allocator_is_told_which_law_it_breaks(fn, law):
    with pytest.raises(ContractError, match=rf"allocator 'mine' breaks the law of {law}.*\(sparsity "):
        check_allocator(rule(fn))


def test_a_good_allocator_passes():
    check_allocator(rule(good))


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="Did you mean 'local'"):
        check_allocator("locall")
