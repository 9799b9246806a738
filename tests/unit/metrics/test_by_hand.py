"""Every metric on 3 tokens x 2 channels, worked out by hand.

token    h                g
0        1    -2          0.5   1
1        3     0         -1     2
2       -2     6          0     0      (nothing is predicted from the last token: 2 predicted tokens)

sum h    2     4       sum |h|    6      8      sum h^2   14   40
|h g|    0.5 + 3 = 3.5           2 + 0 = 2
(h g)^2  0.25 + 9 = 9.25         4 + 0 = 4
g^2      0.25 + 1 = 1.25         1 + 4 = 5

gate rows (3, 4), (0, 1); up rows (1, 0), (6, 8); down columns (5, 12), (-3, 4)
L2 norms  gate 5, 1; up 1, 10; down 13, 5;  L1 norms of down 17, 7
"""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from ffnscope.registry import METRICS
from ffnscope.types import ChannelStats, FFNSite, FFNWeights
from hand_example import GATED, PLAIN, SITE, G, H, stats_of

EXPECTED = {
    "activation_l2_norm": (sqrt(14 / 3), sqrt(40 / 3)),
    "activation_mean": (2.0, 8 / 3),
    "activation_variance": (38 / 9, 104 / 9),  # 14/3 - (2/3)^2, 40/3 - (4/3)^2
    # the histogram reads token 0 only: 1 in [1, 1.25), 2 in [2, 2.5); middles sqrt(1.25), sqrt(5); means 2, 8/3
    "activation_outlier_index": (sqrt(1.25) / 2, sqrt(5) * 3 / 8),
    "wanda": (17 * sqrt(14 / 3), 7 * sqrt(40 / 3)),
    "scar_activation_power": (14 / 3, 40 / 3),
    "scar_taylor": (1.75, 1.0),
    "scar_curvature": (0.625, 2.5),
    "scar_loss_proxy": (2.3125, 1.0),
    "scar_loss_proxy_factored": (35 / 24, 50 / 3),  # 14/3 * 0.625 / 2, 40/3 * 2.5 / 2
    "weight_magnitude": (19.0, 16.0),
    "magnitude": (65.0, 50.0),
}
EXPECTED_PLAIN = EXPECTED | {"weight_magnitude": (14.0, 15.0), "magnitude": (13.0, 50.0)}


@pytest.mark.parametrize("weights", [GATED, PLAIN], ids=["gated", "plain"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EXPECTED)
def test_metric_is_what_it_says(name, dtype, weights):
    rule = METRICS.get(name)
    expected = (EXPECTED if weights.gate is not None else EXPECTED_PLAIN)[name]
    cast = [None if t is None else t.to(dtype) for t in (weights.gate, weights.up, weights.down)]
    found = rule.fn(stats_of(rule, H.to(dtype), G.to(dtype)), FFNWeights(*cast))
    # all inputs are exact in every dtype, so that only reductions round
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_every_metric_of_these_families_has_a_value_by_hand():
    families = {"activation", "gradient", "weight"}
    assert {n for n in METRICS.names() if METRICS.get(n).family in families} == {*EXPECTED, "random"}


def test_random_is_seeded_by_number_and_site():
    rule = METRICS.get("random")
    other = FFNSite(1, "layers.1.mlp", "gate_proj", "up_proj", "down_proj", 2, 2)
    draws = {
        (seed, site.name): tuple(rule.fn(ChannelStats(site, {}, {}, {}), GATED, seed=seed).tolist())
        for seed in (0, 1)
        for site in (SITE, other)
    }
    assert len(set(draws.values())) == 4
    assert all(0 <= v < 1 for d in draws.values() for v in d)
    # as a number, so that a plan of today can be made again tomorrow
    assert draws[0, "layers.0.mlp"] == pytest.approx((0.3181171045764368, 0.585849974230756), abs=1e-12)
