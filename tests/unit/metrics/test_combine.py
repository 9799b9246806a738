"""A composite: normalisation, weights, and parts that are missing or unknown."""

from __future__ import annotations

import pytest
import torch

from ffnscope.errors import UnknownNameError, UsageError
from ffnscope.registry import METRICS
from ffnscope.types import ChannelStats, FFNSite, FFNWeights

SITE = FFNSite(0, "layers.0.mlp", None, "up", "down", 1, 5)
# act_sq 1 4 4 9 16 (root mean square 1 2 2 3 4), taylor_sq 10 8 6 4 2 (loss proxy 5 4 3 2 1)
VALUES = {"act_sq": [1.0, 4.0, 4.0, 9.0, 16.0], "taylor_sq": [10.0, 8.0, 6.0, 4.0, 2.0]}
STATS = ChannelStats(
    SITE,
    {k: torch.tensor(v, dtype=torch.float64) for k, v in VALUES.items()},
    dict.fromkeys(VALUES, 1),
    dict.fromkeys(VALUES, "sum"),
)
WEIGHTS = FFNWeights(None, torch.ones(5, 1), torch.ones(1, 5))
RANKS = {"activation_l2_norm": [0, 0.375, 0.375, 0.75, 1], "scar_loss_proxy": [1, 0.75, 0.5, 0.25, 0]}


def score(stats=STATS, **params):
    return METRICS.get("composite").fn(stats, WEIGHTS, **params)


def test_ranks_are_averaged_among_equals():
    for name, ranks in RANKS.items():
        assert score(parts={name: 2.0}).tolist() == pytest.approx(ranks)


def test_default_parts_weigh_the_same():
    assert score().tolist() == pytest.approx([0.5, 0.5625, 0.4375, 0.5, 0.5])  # wanda is the norm here


def test_weights():
    found = score(parts={"activation_l2_norm": 3.0, "scar_loss_proxy": -1.0})
    first, second = RANKS.values()
    assert found.tolist() == pytest.approx([(3 * a - b) / 4 for a, b in zip(first, second, strict=True)])
    assert torch.equal(found, score(parts={"activation_l2_norm": 30.0, "scar_loss_proxy": -10.0}))
    assert torch.equal(score(parts={"scar_loss_proxy": 1.0, "wanda": 0.0}), score(parts={"scar_loss_proxy": 1.0}))


def test_z_scores():
    # root mean squares 1 2 2 3 4: mean 2.4, variance 1.04
    expected = [(v - 2.4) / 1.04**0.5 for v in (1, 2, 2, 3, 4)]
    assert score(parts={"activation_l2_norm": 1.0}, normalise="z").tolist() == pytest.approx(expected)
    both = score(parts={"activation_l2_norm": 1.0, "scar_loss_proxy": 1.0}, normalise="z")
    second = [v / 2**0.5 for v in (2, 1, 0, -1, -2)]
    assert both.tolist() == pytest.approx([(a + b) / 2 for a, b in zip(expected, second, strict=True)])


@pytest.mark.parametrize("level", [0.0, 0.1, 1e-30, 1e30])
def test_a_constant_part_says_nothing(level):
    values = torch.full((5,), level, dtype=torch.float64)
    values[0] *= 1 + 1e-15  # up to rounding
    stats = ChannelStats(SITE, {**STATS.values, "act_sq": values}, STATS.counts, STATS.reductions)
    found = score(stats, parts={"scar_activation_power": 1.0}, normalise="z")
    assert found.tolist() == [0.0] * 5


def test_the_sign_of_a_part_is_that_of_its_score():
    """Scores are high = keep, also of a metric whose natural value is low = keep."""
    second = torch.tensor([[2.0, 1.9, 0.0], [1.9, 2.0, 0.0], [0.0, 0.0, 2.0]], dtype=torch.float64)
    site = FFNSite(0, "layers.0.mlp", None, "up", "down", 1, 3)
    values = {"h_outer": second, "act_sum": torch.zeros(3, dtype=torch.float64)}
    stats = ChannelStats(site, values, dict.fromkeys(values, 1), dict.fromkeys(values, "sum"))
    found = METRICS.get("composite").fn(stats, FFNWeights(None, torch.ones(3, 1), torch.ones(1, 3)), parts=PART)
    assert found.tolist() == pytest.approx([0.25, 0.25, 1.0])


PART = {"average_redundancy": 1.0}


def test_what_a_composite_needs():
    rule = METRICS.get("composite")
    assert rule.needed({}) == ("taylor_sq", "act_sq")
    assert rule.needed({"parts": {"wanda": 1.0, "activation_l2_norm": 1.0}}) == ("act_sq",)
    assert rule.needed({"parts": {"magnitude": 1.0}}) == ()


def test_a_missing_part_is_an_error():
    with pytest.raises(UsageError, match=r"statistic 'grad_sq' was not collected for layers.0.mlp"):
        score(parts={"wanda": 1.0, "scar_curvature": 1.0})


@pytest.mark.parametrize("act", [score, METRICS.get("composite").needed], ids=["score", "needed"])
@pytest.mark.parametrize(
    ("parts", "error", "text"),
    [
        ({"wandas": 1.0}, UnknownNameError, "Unknown metric 'wandas'. Did you mean 'wanda'"),
        ({"wanda": 1.0, "composite": 1.0}, UsageError, "'composite' cannot be a part of composite"),
        ({"delta_alignment": 1.0}, UsageError, "'delta_alignment' cannot be a part of composite: it needs more than"),
        ({"supernode_protection_score": 1.0}, UsageError, "'supernode_protection_score' cannot be a part of composite"),
        ({}, UsageError, "composite needs parts: metric names with finite weights, not all 0, like {wanda: 1.0}"),
        ({"wanda": 0.0}, UsageError, "composite needs parts"),
        ({"wanda": float("nan")}, UsageError, "composite needs parts"),
        ({"wanda": 1.0, "magnitude": float("inf")}, UsageError, "composite needs parts"),
    ],
    ids=str,
)
def test_impossible_parts(act, parts, error, text):
    with pytest.raises(error, match=text):
        act(parts=parts) if act is score else act({"parts": parts})
