"""Weight metrics through `score`, against the raw parameters of each layout."""

from __future__ import annotations

import pytest
import torch

from ffnscope.errors import NonFiniteError, UnknownNameError, UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.scoring import score
from tiny import D_FF, tiny


def separate(model):
    ffn = model.model.layers[1].mlp
    return ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight


def fused(model):
    ffn = model.model.layers[1].mlp
    return ffn.gate_up_proj.weight[:D_FF], ffn.gate_up_proj.weight[D_FF:], ffn.down_proj.weight


def plain(model):
    ffn = model.gpt_neox.layers[1].mlp
    return None, ffn.dense_h_to_4h.weight, ffn.dense_4h_to_h.weight


def transposed(model):
    ffn = model.transformer.h[1].mlp
    return None, ffn.c_fc.weight.T, ffn.c_proj.weight.T


LAYOUTS = [("llama_bias", separate), ("phi3", fused), ("gpt_neox", plain), ("gpt2", transposed)]


@pytest.mark.parametrize(("arch", "raw"), LAYOUTS, ids=[a for a, _ in LAYOUTS])
def test_norms_of_every_layout(arch, raw):
    model = tiny(arch)
    gate, up, down = raw(model)
    rows = [w.detach().double() for w in (gate, up, down.T) if w is not None]
    norms = [[sum(float(v) ** 2 for v in row) ** 0.5 for row in w] for w in rows]
    site = find_sites(model)[1]
    expected_sum = [sum(n) for n in zip(*norms, strict=True)]
    assert score(model, [site], "weight_magnitude").values[site].tolist() == pytest.approx(expected_sum, rel=1e-6)
    expected_product = [torch.tensor(n).prod().item() for n in zip(*norms, strict=True)]
    assert score(model, [site], "magnitude").values[site].tolist() == pytest.approx(expected_product, rel=1e-6)


def test_scores_tell_how_they_were_made():
    model = tiny("llama")
    found = score(model, find_sites(model), "random", {"text": "none"}, seed=3)
    assert found.facts["params"] == {"seed": 3}
    assert found.facts["text"] == "none"
    assert {v.dtype for v in found.values.values()} == {torch.float64}


def test_errors():
    model = tiny("llama")
    sites = find_sites(model)
    with pytest.raises(UnknownNameError, match=r"Unknown parameter of metric 'random' 'sed'. Did you mean 'seed'"):
        score(model, sites, "random", sed=1)
    with pytest.raises(UsageError, match=r"'act_sq' was not collected for model.layers.0.mlp.*Calibrate again"):
        score(model, sites, "wanda")
    with pytest.raises(UsageError, match="no FFN site to score"):
        score(model, [], "magnitude")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'magnitude' is NaN or infinite for 1 of 48 channels of model.layers.1"):
        score(model, sites, "magnitude")
