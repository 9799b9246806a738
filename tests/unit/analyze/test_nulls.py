"""Matched sets, p-values of draws, Holm."""

from __future__ import annotations

import pytest
import torch

from ffnscope.analyze.nulls import check_draws, compare, holm, matched_sets, random_sets
from ffnscope.errors import UsageError


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_p_values_count_the_value_itself():
    drawn = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert compare(2.5, drawn).p == pytest.approx(3 / 5)
    assert compare(9.0, drawn).p == pytest.approx(1 / 5)
    assert compare(2.0, drawn, "lower").p == pytest.approx(3 / 5)
    one = compare(4.0, drawn)
    assert one.effect == pytest.approx(1.5 / drawn.std(correction=0).item())
    assert one.low == pytest.approx(1.075) and one.high == pytest.approx(3.925)


def test_draws_that_are_alike_have_no_effect_size():
    assert compare(1.0, torch.ones(5)).effect is None


def test_random_sets_have_no_repeats():
    sets = random_sets(5, 9, 300, random())
    assert sets.shape == (300, 5)
    assert all(len(set(row)) == 5 for row in sets.tolist())
    counts = torch.bincount(sets.flatten(), minlength=9).double() / 300
    assert torch.allclose(counts, torch.full((9,), 5 / 9, dtype=torch.float64), atol=0.12)
    with pytest.raises(UsageError, match="cannot draw 10 channels of 9"):
        random_sets(10, 9, 1, random())


def test_matched_sets_are_spread_as_the_targets():
    candidates = torch.randn(2000, generator=random())
    targets = torch.cat([torch.full((6,), 2.5), torch.zeros(3)])
    sets = matched_sets(targets, candidates, 200, random(1))
    assert all(len(set(row)) == 9 for row in sets.tolist())
    values = candidates[sets].sort(dim=1).values
    assert float(values[:, 3:].min()) > 1.2  # the top tenth of the candidates
    assert float(values[:, :3].abs().max()) < 0.3  # the tenth around the median


def test_a_bin_that_is_too_small_is_joined_with_its_neighbour():
    candidates = torch.arange(40.0)
    sets = matched_sets(torch.full((7,), 100.0), candidates, 100, random())
    assert sets.min() >= 24 and sets.max() == 39  # four bins of four hold twice seven
    sets = matched_sets(torch.full((7,), -100.0), candidates, 100, random())
    assert sets.max() < 40 and all(len(set(row)) == 7 for row in sets.tolist())
    with pytest.raises(UsageError, match="cannot draw 41 channels of 40"):
        matched_sets(torch.zeros(41), candidates, 2, random())


@pytest.mark.parametrize("seed", range(5))
def test_any_targets_get_as_many(seed: int):
    source = random(seed)
    candidates, targets = torch.randn(30, generator=source), 3 * torch.randn(13, generator=source)
    sets = matched_sets(targets, candidates, 20, source)
    assert sets.shape == (20, 13)
    assert all(len(set(row)) == 13 for row in sets.tolist())


def test_p_values_are_uniform_under_the_null():
    source = random(3)
    p = torch.tensor([compare(float(v[0]), v[1:]).p for v in torch.randn(600, 201, generator=source)])
    for level in (0.05, 0.25, 0.5, 0.75):
        assert float((p <= level).double().mean()) == pytest.approx(level, abs=0.06)


def test_too_few_draws_are_refused():
    with pytest.raises(UsageError, match="draws must be at least 200, for p-values down to 0"):
        check_draws(50)
