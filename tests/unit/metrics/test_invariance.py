"""Scaling a channel's up row by c and its down column by 1/c leaves a gated FFN as it is. Which scores notice?"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from ffnscope.registry import METRICS
from ffnscope.types import FFNWeights
from hand_example import DOWN, GATE, UP, G, H, X, inputs_of, stats_of

# metric -> power of c that the channel's score is multiplied by; None = it changes, but not by a power of c
TABLE = {
    "activation_l2_norm": 1,
    "activation_mean": 1,
    "minitron": 1,
    "activation_variance": 2,
    "activation_outlier_index": 0,
    "wanda": 0,
    "scar_activation_power": 2,
    "scar_taylor": 0,
    "scar_curvature": -2,
    "scar_loss_proxy": 0,
    "scar_loss_proxy_factored": 0,
    "llm_pruner": 0,
    "weight_magnitude": None,
    "magnitude": 0,
    "peak_to_peak": None,
    "random": 0,
    "rayleigh_quotient": 0,
    "delta_alignment": None,
    "mutual_information_gaussian": 0,
    "average_redundancy": 0,
    "pairwise_redundancy_gaussian": 0,
    "sparsegpt": None,
    "flap": 0,
    "obs": None,
    "obs_loss": None,
    "obs_general": None,
    "supernode_protection_score": 0,
    "supernode_connectivity_score": 0,
    "composite": 0,
    "write_norm": 0,
    "weighted_pagerank": 0,
    "modified_pagerank": 0,
    "layerwise_norm": None,
    "layerwise_activation": None,
    "layerwise_wanda": None,
    "layerwise_weighted_pagerank": None,
    "layerwise_modified_pagerank": None,
}
"""Metrics of scope "site"; the others are measured on a model, in test_graph_table.py."""


def score(name, h, g, up, down, **params):
    rule = METRICS.get(name)
    weights = FFNWeights(GATE.double(), up, down)
    return rule.fn(stats_of(rule, h, g, X.double()), weights, **inputs_of(rule, weights), **params).double()


def test_the_table_is_complete():
    assert list(TABLE) == [name for name in METRICS.names() if METRICS.get(name).scope == "site"]


@pytest.mark.parametrize("factors", [(2.0, 1.0), (1.0, 0.25), (3.0, 0.1)], ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_rescaling_that_preserves_the_function(name, factors):
    c = torch.tensor(factors, dtype=torch.float64)
    h, g, up, down = H.double(), G.double(), UP.double(), DOWN.double()
    before, after = score(name, h, g, up, down), score(name, h * c, g / c, up * c[:, None], down / c)
    power = TABLE[name]
    if power is None:
        assert not torch.allclose(after, before, rtol=1e-3)
        return
    # 3 and 0.1 move values to other bins, whose middles lie elsewhere in the bin; powers of 2 move whole octaves
    tolerance = 0.25 if name == "activation_outlier_index" and 3.0 in factors else 1e-12
    assert torch.allclose(after, before * c**power, rtol=tolerance, atol=0)


def test_sparsegpt_would_be_invariant_without_damping():
    c = torch.tensor([3.0, 0.1], dtype=torch.float64)
    h, g, up, down = H.double(), G.double(), UP.double(), DOWN.double()
    before = score("sparsegpt", h, g, up, down, damping=1e-12)
    after = score("sparsegpt", h * c, g / c, up * c[:, None], down / c, damping=1e-12)
    assert torch.allclose(after, before, rtol=1e-9)


def test_delta_alignment_is_invariant_when_the_reference_is_rescaled_too():
    rule = METRICS.get("delta_alignment")
    c = torch.tensor([[3.0], [0.1]], dtype=torch.float64)
    weights = FFNWeights(GATE.double(), UP.double(), DOWN.double())
    reference = inputs_of(rule, weights)["reference"]
    scaled = [FFNWeights(w.gate, w.up * c, w.down) for w in (weights, reference)]
    before, after = (rule.fn(stats_of(rule), w, reference=r) for w, r in ((weights, reference), scaled))
    assert torch.allclose(after, before, rtol=1e-12)


@pytest.mark.parametrize("name", TABLE)
def test_every_docstring_says_so(name):
    said = {0: "Invariant", 1: "Scales with c", 2: "Scales with c^2", -2: "Scales with 1/c^2", None: "Changes"}
    text = " ".join((METRICS.get(name).fn.__doc__ or "").split())
    assert name == "random" or f"{said[TABLE[name]]} under up * c, down / c" in text


def test_the_rescaling_does_preserve_the_function():
    x = torch.randn(5, 2, dtype=torch.float64)

    def ffn(up, down):
        return (silu(x @ GATE.double().T) * (x @ up.double().T)) @ down.double().T

    assert torch.allclose(ffn(UP * 3, DOWN / 3), ffn(UP, DOWN), rtol=1e-6)
