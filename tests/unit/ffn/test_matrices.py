"""Matrices one by one: the same views as an FFN's weights, whatever they are stored in."""

from __future__ import annotations

import pytest
import torch

from ffnscope.errors import LayoutError, NotAvailableError
from ffnscope.ffn.matrices import Matrix, check_apart, linear_modules, matrices_of
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from reconstructions import make
from tiny import tiny
from tiny_all import tiny_causal_lm


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "mixtral", "dbrx", "gpt_oss", "aria_text", "listed"])
def test_weights_are_the_views_of_the_site(name: str) -> None:
    model = make(name)
    for site in find_sites(model):
        matrices, weights = matrices_of(site), weights_of(model, site)
        assert torch.equal(matrices[site.down].weight(model), weights.down)
        up = matrices[site.up].weight(model)
        if site.fused is None:
            assert torch.equal(up, weights.up)
        else:
            assert up.shape == (2 * site.d_ff, site.d_model)
            both = torch.cat([weights.up, weights.gate if weights.gate is not None else weights.up])
            torch.testing.assert_close(up.sum(0), both.sum(0))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "dbrx", "gpt_oss"])
def test_entries_hold_the_whole_matrix_as_stored(name: str) -> None:
    model = make(name)
    for matrix in (m for s in find_sites(model) for m in matrices_of(s).values()):
        entry, outputs_first = matrix.entry(model)
        stored = entry.parameter.index_select(entry.axis, entry.index)
        assert torch.equal(stored if outputs_first else stored.T, matrix.weight(model))
    names = [m.name for s in find_sites(model) for m in matrices_of(s).values()]
    assert len(set(names)) == len(names)


def test_linear_modules_of_blocks() -> None:
    model = tiny("gpt2")
    found = linear_modules(model, ["transformer.h.1"])
    assert [m.path for m in found] == [
        f"transformer.h.1.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert found[2].weight(model).shape == (48, 32)  # [out, in], though Conv1D is [in, out]


def test_one_parameter_at_two_places_is_refused() -> None:
    model = tiny_causal_lm("zamba")
    matrices = [m for m in linear_modules(model, ["model"]) if "down_proj" in m.path]
    with pytest.raises(NotAvailableError, match=r"are one parameter with inputs of its own at each place"):
        check_apart(model, matrices)


def test_what_is_not_there_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(LayoutError, match=r"model\.layers\.9\.mlp\.up_proj is not in this model"):
        Matrix("model.layers.9.mlp.up_proj").weight(model)
    with pytest.raises(LayoutError, match=r"model\.layers\.0\.mlp is no linear module in this model"):
        Matrix("model.layers.0.mlp").weight(model)
