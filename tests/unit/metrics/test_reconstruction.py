"""Reconstruction metrics: degenerate statistics and parameters out of range."""

from __future__ import annotations

import pytest
import torch

from ffnscope.errors import UsageError
from ffnscope.registry import METRICS
from ffnscope.types import ChannelStats, FFNSite, FFNWeights

SITE = FFNSite(0, "layers.0.mlp", None, "up", "down", 2, 4)
WEIGHTS = FFNWeights(None, torch.ones(4, 2), torch.tensor([[1.0, 2.0, 0.0, 4.0], [1.0, 0.0, 0.0, 3.0]]))


def score(second, **params):
    stats = ChannelStats(SITE, {"h_outer": second.double()}, {"h_outer": 1}, {"h_outer": "sum"})
    return METRICS.get("sparsegpt").fn(stats, WEIGHTS, **params)


def test_uncorrelated_channels_score_their_own_power():
    # damping 0.01 * (4 + 9 + 1 + 2) / 4 = 0.04; column powers 2, 4, 0, 25
    assert score(torch.diag(torch.tensor([4.0, 9.0, 1.0, 2.0]))).tolist() == pytest.approx(
        [2 * 4.04, 4 * 9.04, 0, 25 * 2.04]
    )


def test_channels_that_are_never_active():
    assert score(torch.zeros(4, 4)).tolist() == [0.0] * 4


def test_a_copy_costs_almost_nothing():
    h = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    found = score(h.T @ h, damping=1e-9)
    assert found[:2].max() < 1e-8


def test_the_statistics_are_left_alone():
    second = torch.eye(4, dtype=torch.float64)
    before = second.clone()
    score(second)
    assert torch.equal(second, before)


@pytest.mark.parametrize("damping", [0.0, -0.01, float("nan"), float("inf")])
def test_damping_out_of_range(damping):
    text = f"sparsegpt: damping must be positive, a share of the mean of diag H; got {damping:g}"
    with pytest.raises(UsageError, match=text):
        score(torch.eye(4), damping=damping)


def test_damping_that_is_too_small():
    h = torch.tensor([[1.0, 1.0, 3.0, 0.1]])
    with pytest.raises(UsageError, match=r"layers.0.mlp: the second moment.*raise sparsegpt.damping above 1e-30"):
        score(h.T @ h, damping=1e-30)
