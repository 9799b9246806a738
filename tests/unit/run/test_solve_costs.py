"""Estimates of dense linear algebra: they grow as the work does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ffnscope import FFNSite
from ffnscope.analyze.curves import CurveOptions
from ffnscope.analyze.measured import CurveRounds
from ffnscope.apply.method import Method
from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.run.estimate import curves_line
from ffnscope.run.lines import Line, with_more
from ffnscope.run.solve_costs import (
    curve_operations,
    moment_operations,
    order_operations,
    refit_operations,
    score_line,
    seconds_per_operation,
)


def sites(d_ff: int, count: int = 1) -> list[FFNSite]:
    return [FFNSite(i, f"layers.{i}", None, "up", "down", 16, d_ff) for i in range(count)]


def test_orders_grow_with_the_cube() -> None:
    one, twice = (order_operations(sites(n), "obs_loss") for n in (10_000, 20_000))
    assert twice / one == pytest.approx(8, rel=0.01)
    assert order_operations(sites(10_000, 3), "obs") == pytest.approx(3 * one)
    assert order_operations(sites(10_000), "wanda") == 0


def test_moments_grow_with_the_tokens() -> None:
    assert moment_operations(sites(8), 20) == 2 * moment_operations(sites(8), 10) == 0.5 * 20 * 64
    assert moment_operations(sites(8), 20, ["act_sq"]) == 0


def test_experts_of_a_layer_share_the_tokens() -> None:
    experts = [replace(site, layer=0, expert=i) for i, site in enumerate(sites(8, 4))]
    assert moment_operations(experts, 20) == pytest.approx(moment_operations(sites(8), 20))


def test_every_damping_is_a_factorisation() -> None:
    chosen, given = (refit_operations(sites(4096), Method(damping=d), 1.0, 0) for d in (None, 0.1))
    assert chosen / given == pytest.approx(5, rel=0.1)
    one_shot = refit_operations(sites(4096), Method(reconstruct="one_shot"), 1.0, 1000)
    sequential = refit_operations(sites(4096), Method(), 1.0, 1000)
    cross = 1000 * 16 * 4096
    assert sequential - one_shot == pytest.approx(moment_operations(sites(4096), 1000) + cross)
    assert refit_operations(sites(4096), Method(reconstruct="none"), 0.5, 1000) == 0
    assert refit_operations(sites(4096), Method(), 0.5, 0) < refit_operations(sites(4096), Method(), 0.9, 0)


def test_curves_are_solved_once_per_cut_at_the_measured_speed() -> None:
    """Half of 8 channels, d_model 16: 4^3 / 3 for the factor, 2 * 4^2 * 16 to solve, 4 * 4 * 8 * 16 for the errors."""
    one = CurveRounds(1, 2, CurveOptions((0.5,), 1))
    each = 4**3 / 3 + 2 * 4**2 * 16 + 4 * 4 * 8 * 16
    assert curve_operations(sites(8, 3), one) == pytest.approx(3 * each)
    assert curve_operations(sites(8, 3), replace(one, rounds=2)) == pytest.approx(3 * 5 * each)
    text = contiguous_windows(torch.zeros(2, 4, dtype=torch.long), "zeros")
    plain, slow, quick = (curves_line(sites(8, 3), one, text, 1.0, speed) for speed in (None, 1.0, 1e-9))
    assert (slow.seconds or 0) - (plain.seconds or 0) == pytest.approx(3 * each)
    assert quick.seconds == pytest.approx(plain.seconds)
    assert slow.what == f"{plain.what}, each refitted"


def test_lines() -> None:
    assert 0 < seconds_per_operation(torch.nn.Linear(2, 2)) < 1e-6
    assert score_line("what", sites(8), ["wanda"], 1.0).seconds is None
    assert score_line("what", sites(1000), ["wanda", "obs"], 1e-9).seconds == pytest.approx(4.032, rel=0.01)
    assert with_more(Line("a", "b", 1.0), 2.0).seconds == 3.0
