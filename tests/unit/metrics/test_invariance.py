"""Scaling a channel's up row by c and its down column by 1/c leaves a gated FFN as it is. Which scores notice?"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from ffnscope.registry import METRICS
from ffnscope.types import FFNWeights
from hand_example import DOWN, GATE, UP, G, H, stats_of

# metric -> power of c that its score is multiplied by; None = it changes, but not by a power of c
TABLE = {
    "activation_l2_norm": 1,
    "activation_mean": 1,
    "activation_variance": 2,
    "activation_outlier_index": 0,
    "wanda": 0,
    "scar_activation_power": 2,
    "scar_taylor": 0,
    "scar_curvature": -2,
    "scar_loss_proxy": 0,
    "scar_loss_proxy_factored": 0,
    "weight_magnitude": None,
    "magnitude": 0,
    "random": 0,
}


def score(name, h, g, up, down):
    rule = METRICS.get(name)
    return rule.fn(stats_of(rule, h, g), FFNWeights(GATE.double(), up, down)).double()


@pytest.mark.parametrize("c", [2.0, 0.25, 3.0])
@pytest.mark.parametrize("name", TABLE)
def test_rescaling_that_preserves_the_function(name, c):
    h, g, up, down = H.double(), G.double(), UP.double(), DOWN.double()
    before, after = score(name, h, g, up, down), score(name, h * c, g / c, up * c, down / c)
    power = TABLE[name]
    if power is None:
        assert not torch.allclose(after, before, rtol=1e-3)
        return
    # 3 moves values to other bins, whose middles lie elsewhere in the bin; powers of 2 move them by whole octaves
    tolerance = 0.25 if name == "activation_outlier_index" and c == 3.0 else 1e-12
    assert torch.allclose(after, before * c**power, rtol=tolerance, atol=0)


def test_the_rescaling_does_preserve_the_function():
    x = torch.randn(5, 2, dtype=torch.float64)

    def ffn(up, down):
        return (silu(x @ GATE.double().T) * (x @ up.double().T)) @ down.double().T

    assert torch.allclose(ffn(UP * 3, DOWN / 3), ffn(UP, DOWN), rtol=1e-6)
