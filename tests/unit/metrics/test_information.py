"""Information metrics: degenerate statistics, the principal component, sampling, and their cost in memory."""

from __future__ import annotations

import math

import pytest
import torch

from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.errors import UsageError
from ffnscope.metrics import information
from ffnscope.registry import METRICS
from ffnscope.types import FFNSite, FFNWeights

NAMES = ("mutual_information_gaussian", "average_redundancy", "pairwise_redundancy_gaussian")
COPY = -math.log(1e-6) / 2


def draw(n, *width, seed=0):
    return torch.randn(n, *width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def score(name, x, h, **params):
    rule = METRICS.get(name)
    site = FFNSite(0, "layers.0.mlp", None, "up", "down", x.shape[1], h.shape[1])
    sums = Accumulator([site], rule.needed({}))
    sums.begin(torch.ones(1, len(h), dtype=torch.bool), len(h))
    sums.observe_signal(site, "x", x[None])
    sums.observe(site, h[None])
    up = torch.ones(h.shape[1], x.shape[1])
    return rule.fn(sums.result()[site], FFNWeights(None, up, up.T), **params)


@pytest.mark.parametrize("name", NAMES)
def test_constant_channels_share_nothing(name):
    h = draw(50, 6)
    h[:, 0], h[:, 1], h[:, 2] = 0, 3, 1e5
    h[:, 2] += 1e-3 * h[:, 3]  # varies by less than float32 sums can resolve
    found = score(name, draw(50, 4, seed=1), h)
    assert found[:3].tolist() == [0.0] * 3
    assert bool((found[3:] != 0).all())


@pytest.mark.parametrize("x", [torch.zeros(20, 4), torch.full((20, 4), 7.0), draw(1, 4).expand(20, 4)], ids=str)
def test_a_constant_input_shares_nothing(x):
    found = score("mutual_information_gaussian", x.double(), draw(20, 6))
    assert found.tolist() == [0.0] * 6


@pytest.mark.parametrize("name", NAMES)
def test_one_token(name):
    assert score(name, draw(1, 4), draw(1, 6)).tolist() == [0.0] * 6


def test_copies_have_a_large_finite_value():
    h = draw(40, 4)
    h[:, 1] = -2 * h[:, 0]
    x = torch.cat([10 * h[:, 2:3], 0.1 * draw(40, 3, seed=1)], dim=1)
    assert score("mutual_information_gaussian", x, h)[2] > 4
    assert score("mutual_information_gaussian", h[:, 2:3], h)[2].item() == pytest.approx(COPY, abs=1e-6)
    found = -3 * score("average_redundancy", x, h)
    assert found[0].item() == pytest.approx(COPY, abs=1.0)
    assert found[2] < 1


def test_copies_in_float32_score_as_in_float64():
    h = draw(4000, 3)
    h[:, 1] = h[:, 0]
    x = draw(4000, 2, seed=1)
    for name in NAMES:
        exact = score(name, x, h)
        assert torch.allclose(score(name, x.float(), h.float()), exact, rtol=0.05, atol=1e-6), name


@pytest.mark.parametrize("width", [2, 3, 40, 600])
def test_the_leading_component(width):
    """Also where all-ones is in the kernel of the covariance, as after a layer norm without weights."""
    x = draw(700, width) * torch.linspace(1, 2, width, dtype=torch.float64)
    x = x - x.mean(1, keepdim=True)
    cov = torch.cov(x.T, correction=0)
    values, vectors = torch.linalg.eigh(cov)
    value, vector = information._leading(cov)
    assert value.item() == pytest.approx(values[-1].item(), rel=1e-9)
    assert abs((vector @ vectors[:, -1]).item()) == pytest.approx(1, rel=1e-6)
    again = information._leading(cov)
    assert torch.equal(again[1], vector)


@pytest.mark.parametrize("width", [600])
def test_equal_eigenvalues(width):
    for cov in (torch.eye(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)):
        value, vector = information._leading(cov)
        assert value.item() == pytest.approx(cov[0, 0].item())
        assert vector.norm().item() == pytest.approx(1)


def test_a_component_that_is_found_in_no_few_steps(monkeypatch):
    import scipy.sparse.linalg as sparse

    def fail(*args, **kwargs):
        raise sparse.ArpackNoConvergence("no convergence", None, None)

    cov = torch.cov(draw(700, 600).T)
    expected = information._leading(cov)
    monkeypatch.setattr(sparse, "eigsh", fail)
    value, vector = information._leading(cov)
    assert value.item() == pytest.approx(expected[0].item(), rel=1e-9)
    assert abs((vector @ expected[1]).item()) == pytest.approx(1, rel=1e-6)


def test_rows_at_once_change_nothing(monkeypatch):
    x, h = draw(60, 4), draw(60, 11, seed=1)
    for name in NAMES[1:]:
        whole = score(name, x, h)
        monkeypatch.setattr(information, "ROWS", 4)
        assert torch.allclose(score(name, x, h), whole, rtol=1e-12)
        monkeypatch.undo()


def test_partners_are_other_channels_drawn_from_the_seed():
    h = draw(30, 5)
    h[:, 4] = h[:, 3]  # only 3 and 4 are copies
    one = score("pairwise_redundancy_gaussian", h, h, partners=1, seed=0)
    assert one[:3].min() > -1  # nothing is compared with itself
    assert torch.equal(one, score("pairwise_redundancy_gaussian", h, h, partners=1, seed=0))
    assert not torch.equal(one, score("pairwise_redundancy_gaussian", h, h, partners=1, seed=1))
    many = score("pairwise_redundancy_gaussian", h, h, partners=20_000)
    assert torch.allclose(many, score("average_redundancy", h, h), rtol=0.05)


def test_partners_out_of_range():
    with pytest.raises(UsageError, match="pairwise_redundancy_gaussian: partners must be at least 1; got 0"):
        score("pairwise_redundancy_gaussian", draw(5, 2), draw(5, 3), partners=0)
