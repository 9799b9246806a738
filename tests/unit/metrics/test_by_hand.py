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

E[h]      2/3   4/3     E[h^2]  14/3  40/3     E[h0 h1]  (-2 + 0 - 12) / 3 = -14/3
Var(h)    14/3 - 4/9 = 38/9     40/3 - 16/9 = 104/9     Cov(h0, h1)  -14/3 - 8/9 = -50/9
h g       0.5 - 3 = -2.5 and -2 + 0 = -2

x (4, 6), (1, -3), (-2, 3): mean (1, 2), centred (3, 4), (0, -5), (-3, 1), covariance
C = [[6, 3], [3, 14]]: trace 20, and C (1, 3) = 15 (1, 3) is its largest eigenvalue

w C w / w w  (3, 4): (54 + 72 + 224) / 25 = 14;  (0, 1): 14;  (1, 0): 6;  (6, 8): 14
change since the reference: gate (1, 1), (0, 0); up (0, 2), (1, -1)
w C w / w w  (1, 1): (6 + 6 + 14) / 2 = 13;  (0, 2): 14;  (1, -1): (6 - 6 + 14) / 2 = 7

along (1, 3) the centred x is 15, -15, 0: variance 150; centred h (1, 7, -8) / 3 and (-10, -4, 14) / 3
covariances (15 - 105) / 9 = -10 and (-150 + 60) / 9 = -10
rho^2 = 100 / (150 * 38/9) = 3/19 and 100 / (150 * 104/9) = 3/52
rho^2 of h0 and h1 = (50/9)^2 / (38/9 * 104/9) = 2500 / 3952

dy (1, 0), (1, 2), (0, 0): E[dy dy^T] = G = [[1, 1], [1, 2]]
products of the columns of down 169, 33, 25; by G 433, 65, 17

E[x^2] = 7, 18; p = (sqrt 7, sqrt 18) over their sum; W_up x = (4, 1, -2), (72, -18, 12), of mean square 7, 1884
what a channel writes  w = 13 sqrt(14/3), 5 sqrt(40/3)
shares  gate (3, 4) / 7, (0, 1); up (1, 0), (3, 4) / 7; their means (5, 2) / 7, (3, 11) / 14
"""

from __future__ import annotations

from math import log, sqrt

import pytest
import torch

from ffnscope.errors import UsageError
from ffnscope.registry import METRICS
from ffnscope.types import ChannelStats, FFNSite, FFNWeights
from hand_example import GATED, PLAIN, SITE, G, H, X, inputs_of, stats_of

IN = (sqrt(7), sqrt(18))
P = tuple(v / sum(IN) for v in IN)
LINEAR = (sqrt(7), sqrt(1884))
WRITE = (13 * sqrt(14 / 3), 5 * sqrt(40 / 3))


def pagerank(strength, degree, out, unit):
    """0.9 (0.5 strength + 0.5 degree) + 0.1 out / sum(out), times a unit."""
    return tuple(unit * (0.45 * (s + d) + 0.1 * o / sum(out)) for s, d, o in zip(strength, degree, out, strict=True))


def of_sum(*values):
    return tuple(v / sum(values) for v in values)


def strength(edges):
    """Each input's importance, spread over channels by the size of its edges."""
    columns = [sum(row[d] for row in edges) for d in (0, 1)]
    return tuple(sum(row[d] / columns[d] * P[d] for d in (0, 1)) for row in edges)


def edges(*shares):
    return [[w * s for s in row] for w, row in zip(WRITE, shares, strict=True)]


MIXED = ((5 / 7, 2 / 7), (3 / 14, 11 / 14))
UP_ONLY = ((1, 0), (3 / 7, 4 / 7))

FIRST = 40 / 3 + 0.09 - 196 / 9 / (14 / 3 + 0.09)
DAMPED = 169 * (14 / 3 + 0.09) + 25 * (40 / 3 + 0.09)
LOSS = 433 * (14 / 3 + 0.09) + 17 * (40 / 3 + 0.09)
EXPECTED = {
    "activation_l2_norm": (sqrt(14 / 3), sqrt(40 / 3)),
    "activation_mean": (2.0, 8 / 3),
    "minitron": (2 / sqrt(3), 8 / 3 / sqrt(3)),  # one window of three tokens: the means of |h|
    "activation_variance": (38 / 9, 104 / 9),  # 14/3 - (2/3)^2, 40/3 - (4/3)^2
    # the histogram reads token 0 only: 1 in [1, 1.25), 2 in [2, 2.5); middles sqrt(1.25), sqrt(5); means 2, 8/3
    "activation_outlier_index": (sqrt(1.25) / 2, sqrt(5) * 3 / 8),
    "wanda": (17 * sqrt(14 / 3), 7 * sqrt(40 / 3)),
    "scar_activation_power": (14 / 3, 40 / 3),
    "scar_taylor": (1.75, 1.0),
    "scar_curvature": (0.625, 2.5),
    "scar_loss_proxy": (2.3125, 1.0),
    "scar_loss_proxy_factored": (35 / 24, 50 / 3),  # 14/3 * 0.625 / 2, 40/3 * 2.5 / 2
    "llm_pruner": (1.25, 1.0),
    "rayleigh_quotient": (0.5, 0.7),  # (14 + 6) / 2 / 20, 14 / 20
    "delta_alignment": (0.675, 0.175),  # (13 + 14) / 2 / 20, (0 + 7) / 2 / 20
    "mutual_information_gaussian": (log(19 / 16) / 2, log(52 / 49) / 2),
    "average_redundancy": (-log(3952 / 1452) / 2,) * 2,
    "pairwise_redundancy_gaussian": (-log(3952 / 1452) / 2,) * 2,
    # damping 0.01 * (14/3 + 40/3) / 2 = 0.09; 1 / [H^-1]_00 = H_00 - H_01^2 / H_11
    "sparsegpt": (
        169 * (14 / 3 + 0.09 - 196 / 9 / (40 / 3 + 0.09)),
        25 * (40 / 3 + 0.09 - 196 / 9 / (14 / 3 + 0.09)),
    ),
    # channel 1 goes first; then all of the output is lost, less what was lost before
    "obs": (DAMPED - 25 * FIRST + 66 * -14 / 3, 25 * FIRST),
    "obs_loss": ((LOSS - 17 * FIRST + 130 * -14 / 3) / 2, 17 * FIRST / 2),
    # the mean ranks of obs_loss (channel 0 first) and of minitron (channel 1 first) are equal: as obs_loss
    "obs_general": ((LOSS - 17 * FIRST + 130 * -14 / 3) / 2, 17 * FIRST / 2),
    "flap": (38 / 9 * 169, 104 / 9 * 25),
    "composite": (1.0, 0.0),  # channel 0 is first by scar_loss_proxy and by wanda
    "weight_magnitude": (19.0, 16.0),
    "magnitude": (65.0, 50.0),
    "peak_to_peak": (8.0, 15.0),  # (4 + 3) + (1 + 0), (1 + 0) + (8 + 6)
    "write_norm": WRITE,
    "weighted_pagerank": pagerank(strength(edges(*MIXED)), (0.5, 0.5), WRITE, sum(WRITE)),
    "modified_pagerank": tuple(w * (a * P[0] + b * P[1]) for w, (a, b) in zip(WRITE, MIXED, strict=True)),
    "layerwise_norm": (1 / 15, 14 / 15),
    "layerwise_activation": of_sum(*LINEAR),
    "layerwise_wanda": of_sum(IN[0], 6 * IN[0] + 8 * IN[1]),
    # columns (1, 6) and (0, 8); channel 0 has no edge from input 1
    "layerwise_weighted_pagerank": pagerank(
        (P[0] / 7, 6 * P[0] / 7 + P[1]), (P[0] / 2, P[0] / 2 + P[1]), LINEAR, unit=1
    ),
    "layerwise_modified_pagerank": of_sum(LINEAR[0] * P[0], LINEAR[1] * (6 * P[0] + 8 * P[1])),
}
EXPECTED_PLAIN = EXPECTED | {
    "weight_magnitude": (14.0, 15.0),
    "peak_to_peak": (1.0, 14.0),
    "magnitude": (13.0, 50.0),
    "rayleigh_quotient": (0.3, 0.7),
    "delta_alignment": (0.7, 0.35),
    "weighted_pagerank": pagerank(strength(edges(*UP_ONLY)), (P[0] / 2, P[0] / 2 + P[1]), WRITE, sum(WRITE)),
    "modified_pagerank": tuple(w * (a * P[0] + b * P[1]) for w, (a, b) in zip(WRITE, UP_ONLY, strict=True)),
}


@pytest.mark.parametrize("weights", [GATED, PLAIN], ids=["gated", "plain"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EXPECTED)
def test_metric_is_what_it_says(name, dtype, weights):
    rule = METRICS.get(name)
    expected = (EXPECTED if weights.gate is not None else EXPECTED_PLAIN)[name]
    cast = FFNWeights(*[None if t is None else t.to(dtype) for t in (weights.gate, weights.up, weights.down)])
    found = rule.fn(stats_of(rule, H.to(dtype), G.to(dtype), X.to(dtype)), cast, **inputs_of(rule, cast))
    # all inputs are exact in every dtype, so that only reductions round
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_every_metric_has_a_value_by_hand():
    elsewhere = {"supernode"}  # needs more channels: test_supernode.py
    rules = [METRICS.get(name) for name in METRICS.names()]
    found = {rule.name for rule in rules if rule.family not in elsewhere and rule.scope == "site"}
    assert found == {*EXPECTED, "random"}


def test_norms_of_another_order():
    rule = METRICS.get("magnitude")
    assert rule.fn(stats_of(rule), GATED, p=1.0).tolist() == pytest.approx((7 * 1 * 17, 1 * 14 * 7))
    rule = METRICS.get("layerwise_norm")
    assert rule.fn(stats_of(rule), GATED, p=2.0).tolist() == pytest.approx((1 / 11, 10 / 11))
    for name in ("magnitude", "layerwise_norm"):
        with pytest.raises(UsageError, match=r"the order p of a norm must be at least 1; got 0.5"):
            METRICS.get(name).fn(stats_of(rule), GATED, p=0.5)


def test_the_linear_output_counts_its_bias():
    rule = METRICS.get("layerwise_activation")
    outputs = ((5, 2, -1), (73, -17, 13))  # the bias is 1
    expected = of_sum(*(sqrt(sum(v * v for v in row) / 3) for row in outputs))
    assert rule.fn(stats_of(rule), GATED).tolist() == pytest.approx(expected, rel=1e-6)


def test_numbers_that_cannot_be():
    cases = {
        "weighted_pagerank": ({"gamma": 1.5}, {"theta": -0.1}),
        "modified_pagerank": ({"z_importance": True, "sparsity": 2.0},),
    }
    for name, wrong in cases.items():
        rule = METRICS.get(name)
        for params in wrong:
            with pytest.raises(UsageError, match=r"must be in \[0, 1\]"):
                rule.fn(stats_of(rule), GATED, **params)


def test_absolute_quotients():
    rule = METRICS.get("rayleigh_quotient")
    assert rule.fn(stats_of(rule), GATED, relative=False).tolist() == pytest.approx((10.0, 14.0), rel=1e-6)
    rule = METRICS.get("delta_alignment")
    found = rule.fn(stats_of(rule), GATED, relative=False, **inputs_of(rule, GATED))
    assert found.tolist() == pytest.approx((13.5, 3.5), rel=1e-6)


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
