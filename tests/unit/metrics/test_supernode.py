"""SCAR-Prot and SCAR-Conn on 8 channels, worked out by hand; the core, the halo, and what they do not depend on.

q = h g over 4 tokens, from e1 = (1, 1, -1, -1) and e2 = (1, -1, 1, -1), which are uncorrelated, with mean 0, power 1:

channel   down column      q             LP     Conn           correlation with the core
0 (core)  8  4  0  0       10 e1         50     1
1         1  1  1  1       2 e2           2     2/4 = 0.5      0
2         3  0  1  0       1 + 3e1 + 4e2 13     3/4 = 0.75     3 / 5
3         0  0  2  2       4 e1           8     0              1
4         4  5  0  1       e1 + e2        1     9/10 = 0.9     1 / sqrt 2
5         1  0  3  0       6 e2          18     1/4 = 0.25     0
6         0  0  0  0       0              0     0              0
7        -4  0  1  0       -e1          0.5     4/5 = 0.8     -1, counts 0

The core's main two residual dimensions are 0 and 1. A halo of 3/7 of the 7 other channels is 4, 7, 2 (Conn 0.9, 0.8,
0.75). Ranks of redundancy in it: channel 7 0, channel 2 1/2, channel 4 1. So Protect is 1, 0.2 + 0.8 (1 - 2^-8) =
0.996875, 0.2. Channel 3 repeats the core entirely, but writes elsewhere, so it is not in the halo.
"""

from __future__ import annotations

from math import log

import pytest
import torch

from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.errors import UsageError
from ffnscope.metrics.supernode import connectivity, protection, redundancy_to_core, write_halo
from ffnscope.registry import METRICS
from ffnscope.types import FFNSite, FFNWeights

E1 = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
E2 = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
Q = torch.stack([10 * E1, 2 * E2, 1 + 3 * E1 + 4 * E2, 4 * E1, E1 + E2, 6 * E2, 0 * E1, -E1], dim=1)
COLUMNS = [
    (8, 4, 0, 0),
    (1, 1, 1, 1),
    (3, 0, 1, 0),
    (0, 0, 2, 2),
    (4, 5, 0, 1),
    (1, 0, 3, 0),
    (0, 0, 0, 0),
    (-4, 0, 1, 0),
]
DOWN = torch.tensor(COLUMNS, dtype=torch.float64).T
SITE = FFNSite(0, "layers.0.mlp", None, "up", "down", 4, 8)
CORE = torch.tensor([0])
CONN = (1.0, 0.5, 0.75, 0.0, 0.9, 0.25, 0.0, 0.8)
NAMES = ("supernode_protection_score", "supernode_connectivity_score")
HALO = {"halo_fraction": 3 / 7, "support": 2}


def weights(down=DOWN):
    return FFNWeights(None, torch.ones(8, 4, dtype=torch.float64), down)


def stats_of(h=None, g=Q, core=CORE):
    h = torch.ones_like(g) if h is None else h
    sums = Accumulator([SITE], METRICS.get(NAMES[0]).needed({}), {SITE: core})
    sums.begin(torch.ones(1, len(g), dtype=torch.bool), len(g))
    sums.observe_gradient(SITE, h[None], g[None])
    return sums.result()[SITE]


def score(name, down=DOWN, core=CORE, **changes):
    signals = {k: changes.pop(k) for k in ("h", "g") if k in changes}
    return METRICS.get(name).fn(stats_of(core=core, **signals), weights(down), core=core, **HALO | changes)


def test_scores():
    # 100 = the core's LP of 50 + the largest, 50; channel 2: 13 * 0.996875, channel 4: 1 * 0.2, channel 7: 0.5 * 1
    expected = (100, 2, 12.959375, 8, 0.2, 18, 0, 0.5)
    assert score("supernode_protection_score").tolist() == pytest.approx(expected, rel=1e-12)
    # channel 2: 13 (0.25 + 0.75 * 0.996875), channel 4: 0.1 + 0.9 * 0.2
    expected = (100, 2, 12.96953125, 8, 0.28, 18, 0, 0.5)
    assert score("supernode_connectivity_score").tolist() == pytest.approx(expected, rel=1e-12)


def test_ingredients():
    assert connectivity(weights(), CORE, 2).tolist() == pytest.approx(CONN, rel=1e-12)
    assert connectivity(weights(), CORE, 1)[4] == pytest.approx(0.4)
    assert write_halo(connectivity(weights(), CORE, 2), CORE, 3 / 7).tolist() == [2, 4, 7]
    found = redundancy_to_core(stats_of(), CORE)[1:]
    largest = -log(1e-6) / 2  # a full copy of the core, as far as sums resolve it
    assert found.tolist() == pytest.approx((0, -log(0.64) / 2, largest, log(2) / 2, 0, 0, 0), rel=1e-9, abs=1e-12)


def test_the_mean_over_the_most_redundant_core_channels():
    q = torch.cat([Q, torch.stack([E1 + 2 * E2, 3 * E1 - E2], dim=1)], dim=1)[:, [0, 8, 9, 1, 2, 3, 4, 5]]
    core = torch.tensor([0, 1, 2])
    rho = torch.corrcoef(q.T)[:3].clamp_min(0)
    each = -0.5 * torch.log(1 - rho.square().clamp_max(1 - 1e-6))
    for top in (1, 2, 3, 5):
        expected = each.sort(0, descending=True).values[:top].mean(0)
        found = redundancy_to_core(stats_of(g=q, core=core), core, top)
        assert torch.allclose(found[3:], expected[3:], rtol=1e-9, atol=1e-12)


def test_power_and_floor():
    halo = torch.tensor([2, 4, 7])
    assert protection(stats_of(), CORE, halo, 1.0, 0.5)[halo].tolist() == pytest.approx((0.75, 0.5, 1.0))
    assert protection(stats_of(), CORE, halo, 2.0, 0.0)[halo].tolist() == pytest.approx((0.75, 0.0, 1.0))
    assert protection(stats_of(), CORE, halo, 8.0, 1.0).tolist() == [1.0] * 8
    alone = protection(stats_of(), CORE, torch.tensor([4]), 8.0, 0.2)
    assert alone.tolist() == [1.0] * 8  # there is nothing to rank it against


def test_equal_redundancies_share_their_rank():
    halo = torch.tensor([1, 4, 5, 7])  # channels 1, 5 and 7 have none: rank 1/3 each
    found = protection(stats_of(), CORE, halo, 1.0, 0.0)[halo]
    assert found.tolist() == pytest.approx((2 / 3, 0, 2 / 3, 2 / 3), rel=1e-9)


def test_the_halo_is_rounded_and_never_empty():
    conn = torch.tensor(CONN)
    assert [len(write_halo(conn, CORE, f)) for f in (1e-9, 0.1, 0.2, 0.3, 0.5, 1.0)] == [1, 1, 1, 2, 4, 7]
    ties = torch.tensor([0.5, 0.5, 0.5, 0.5])
    assert write_halo(ties, torch.tensor([1]), 0.5).tolist() == [0, 2]
    assert write_halo(ties, torch.arange(4), 0.5).tolist() == []


def test_at_most_half_of_the_residual_dimensions_count():
    """Else Conn would be 1 for every channel of a small model, and the halo an accident of rounding."""
    assert torch.equal(connectivity(weights(), CORE, 256), connectivity(weights(), CORE, 2))
    default = score("supernode_protection_score", support=256)
    assert torch.equal(default, score("supernode_protection_score"))


@pytest.mark.parametrize("name", NAMES)
def test_rescaling_that_preserves_the_function(name):
    """Any channel outside the core, and the core when it is one channel, may be scaled: up * c, down / c."""
    c = torch.tensor([5.0, 0.1, 3.0, 1.0, 1e-3, 7.0, 2.0, 1e3], dtype=torch.float64)
    h = torch.ones_like(Q) * c
    before, after = score(name), score(name, down=DOWN / c, h=h, g=Q / c)
    assert torch.allclose(after, before, rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("name", NAMES)
def test_the_scale_of_the_loss_changes_no_rank(name, scale):
    """LP is quadratic in the loss; redundancy and Protect do not depend on its scale."""
    before, after = score(name), score(name, g=Q * scale)
    rest = torch.arange(1, 8)
    assert torch.allclose(after[rest], before[rest] * scale**2, rtol=1e-9, atol=0)
    assert after[0] > after[rest].max()
    found = redundancy_to_core(stats_of(g=Q * scale), CORE)
    assert torch.allclose(found, redundancy_to_core(stats_of(), CORE), rtol=1e-9, atol=1e-15)


def additive(stats, core):
    """The form with 1e-8 under the root, for comparison."""
    mean, square = stats.mean("taylor_sum"), stats.mean("taylor_sq")
    variance = square - mean.square()
    cross = stats.mean("taylor_core") - torch.outer(mean[core], mean)
    return (cross / (variance[core][:, None] * variance[None] + 1e-8).sqrt())[0]


def test_a_variance_far_below_1e_8_is_a_variance():
    """q of variance 1e-10: the additive form ranks a loud unrelated channel above a quiet copy of the core."""
    random = torch.Generator().manual_seed(0)
    core, noise = torch.randn(2, 400, generator=random, dtype=torch.float64)
    quiet_copy = 0.1 * core
    loud = 10 * (0.2 * core + noise)
    q = 1e-5 * torch.stack([core, quiet_copy, loud, noise, noise, noise, noise, noise], dim=1)
    stats = stats_of(g=q)
    assert float(stats.mean("taylor_sq")[0]) == pytest.approx(1e-10, rel=0.2)
    wrong, right = additive(stats, CORE), redundancy_to_core(stats, CORE)
    assert wrong[2] > wrong[1]
    assert right[1] > 6 > 0.2 > right[2]
    assert float(additive(stats_of(g=q * 1e-6), CORE).abs().max()) < 1e-12 * float(wrong.abs().max()) * 10
    assert torch.allclose(redundancy_to_core(stats_of(g=q * 1e-6), CORE), right, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_core_of_other_statistics_is_refused(name):
    rule = METRICS.get(name)
    for core in (torch.tensor([1]), torch.tensor([0, 1])):
        text = (
            rf"layers.0.mlp: statistic 'taylor_core' was collected for another core than the {len(core)} channels given"
        )
        with pytest.raises(UsageError, match=text):
            rule.fn(stats_of(), weights(), core=core)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"halo_fraction": 0.0}, r"halo_fraction must be in \(0, 1\], a share of the non-core channels; got 0"),
        ({"halo_fraction": 1.5}, r"halo_fraction must be in \(0, 1\].*got 1.5"),
        ({"halo_fraction": float("nan")}, r"halo_fraction must be in \(0, 1\].*got nan"),
        ({"support": 0}, "support must be at least 1 residual dimension; got 0"),
        ({"floor": -0.1}, r"floor must be in \[0, 1\] and power positive; got -0.1 and 8"),
        ({"power": 0.0}, r"floor must be in \[0, 1\] and power positive; got 0.2 and 0"),
        ({"power": float("nan")}, "power positive; got 0.2 and nan"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_parameters_out_of_range(name, change, text):
    with pytest.raises(UsageError, match=text):
        score(name, **change)
