"""What is told of a reconstruction: on which tokens errors were taken, and where the damping had to be raised."""

import pytest
import torch

from ffnscope import Budget, FFNSite, PruningPlan, Reconstruction
from ffnscope.apply.block_fit import refitted
from ffnscope.apply.card import _reconstruction  # pyright: ignore[reportPrivateUsage]
from ffnscope.apply.profile import RAISED, error_profile, judged_on, raised_dampings
from ffnscope.apply.refit import LeastSquares, Moments
from ffnscope.report.error_table import profile_grid

KEPT = torch.tensor([0, 3])


def indefinite():
    """Sums that are no second moment: a damping of 0.1 and above makes them positive definite."""
    second = torch.eye(4, dtype=torch.float64)
    second[0, 3] = second[3, 0] = 1.05
    return Moments(second, 10)


def facts(**one):
    site = {"tokens": 9, "damping": 0.01, "error_without": 0.5, "error": 0.2, "power": 1.0, "refitted": True, **one}
    return {"method": "sequential", "tokens": 9, "sites": {"a": {**site, "held_out": True}, "b": site}}


def told(**one):
    sites = [FFNSite(i, name, None, "up", "down", 3, 4) for i, name in enumerate("ab")]
    plan = PruningPlan(dict.fromkeys(sites, KEPT), "wanda", "local", Budget(0.5))
    return Reconstruction(plan, {site: torch.zeros(3, 2) for site in sites}, facts=facts(**one))


class TestRaised:
    def test_the_damping_that_was_needed(self):
        new, used = LeastSquares.of(torch.ones(3, 4), KEPT, indefinite()).solve(0.01)
        assert used == pytest.approx(0.1) and torch.isfinite(new).all()
        assert LeastSquares.of(torch.ones(3, 4), KEPT, indefinite()).solve(0.5)[1] == 0.5

    def test_it_is_a_fact(self):
        _, found = refitted(torch.ones(3, 4), KEPT, indefinite(), None, 0.01, indefinite)
        assert found["damping"] == 0.01 and found[RAISED] == pytest.approx(0.1)
        _, found = refitted(torch.ones(3, 4), KEPT, indefinite(), None, 0.5, indefinite)
        assert RAISED not in found

    def test_it_is_shown(self):
        assert raised_dampings(facts(held_out=True)) is None
        made = told(held_out=True, **{RAISED: 0.1})
        assert raised_dampings(made.facts) == "2 of 2 FFNs, the most from 0.01 to 0.1 (a)"
        assert "Damping raised, since the factorisation failed: 2 of 2 FFNs" in " ".join(profile_grid(made).notes)
        assert "| damping raised, since the factorisation failed | 2 of 2" in _reconstruction(made.plan, made.facts)


class TestJudgedOn:
    def test_held_out_tokens_are_in_the_saved_columns(self):
        made = told(held_out=True)
        words = "held out to choose the damping, with columns fitted to the others; the saved columns are fitted to all"
        assert words in " ".join(profile_grid(made).notes) and words in _reconstruction(made.plan, made.facts)
        assert "did not see" not in " ".join(profile_grid(made).notes)

    def test_tokens_of_the_fit(self):
        rows = [{"held_out": False}, {"held_out": False}]
        assert judged_on(rows) == "the calibration tokens that the columns are fitted to"

    def test_some_of_both(self):
        made = told(held_out=False)
        assert "(of 1 FFNs, which had none, those of the fit)" in judged_on(error_profile(made.plan, made.facts))
