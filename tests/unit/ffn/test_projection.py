from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ffnscope.errors import LayoutError, ModelError
from ffnscope.ffn.projection import (
    check_resident,
    coupled,
    down_projection,
    in_width,
    is_projection,
    out_axis,
    out_width,
    projection,
    weights_of,
)
from ffnscope.ffn.sites import find_sites
from tiny import D_FF, HIDDEN, tiny

KEPT = torch.tensor([1, 5])


@pytest.mark.parametrize(("module", "axis"), [(nn.Linear(3, 5), 0), (Conv1D(5, 3), 1)])
def test_linear_and_its_transpose(module: nn.Module, axis: int) -> None:
    assert is_projection(module)
    assert (out_axis(module), in_width(module), out_width(module)) == (axis, 3, 5)


@pytest.mark.parametrize("module", [nn.LayerNorm(3), nn.Embedding(3, 4), nn.Conv1d(3, 4, 1), nn.Identity()])
def test_no_projection(module: nn.Module) -> None:
    assert not is_projection(module)


class TestWeights:
    def test_views_of_separate_gate_and_up(self, llama: Any) -> None:
        (site, _), mlp = find_sites(llama), llama.model.layers[0].mlp
        found = weights_of(llama, site)
        assert found.gate is not None
        assert found.gate.data_ptr() == mlp.gate_proj.weight.data_ptr()
        assert torch.equal(found.up, mlp.up_proj.weight) and torch.equal(found.down, mlp.down_proj.weight)
        assert (found.gate_bias, found.up_bias, found.down_bias) == (None, None, None)
        assert not found.up.requires_grad

    def test_biases(self) -> None:
        model = tiny("llama_bias")
        found = weights_of(model, find_sites(model)[0])
        mlp = model.model.layers[0].mlp
        pairs = [(found.gate_bias, mlp.gate_proj), (found.up_bias, mlp.up_proj), (found.down_bias, mlp.down_proj)]
        assert all(bias is not None and torch.equal(bias, module.bias) for bias, module in pairs)

    def test_transposed(self) -> None:
        model = tiny("gpt2")
        found = weights_of(model, find_sites(model)[0])
        mlp = model.transformer.h[0].mlp
        assert found.gate is None and found.up.shape == (D_FF, HIDDEN) and found.down.shape == (HIDDEN, D_FF)
        assert torch.equal(found.up, mlp.c_fc.weight.T) and torch.equal(found.down, mlp.c_proj.weight.T)
        assert found.up_bias is not None and torch.equal(found.up_bias, mlp.c_fc.bias)

    @pytest.mark.parametrize(("order", "gate_half"), [("gate_up", 0), ("up_gate", 1)])
    def test_halves_of_a_fused_matrix(self, order: Any, gate_half: int) -> None:
        model = tiny("phi3")
        site = replace(find_sites(model)[0], fused=order)
        halves = model.model.layers[0].mlp.gate_up_proj.weight.detach().chunk(2)
        found = weights_of(model, site)
        assert found.gate is not None
        assert torch.equal(found.gate, halves[gate_half]) and torch.equal(found.up, halves[1 - gate_half])

    def test_a_change_in_place_changes_the_model(self) -> None:
        model = tiny("gpt2")
        weights_of(model, find_sites(model)[0]).up[3] = 7.0
        assert bool((model.transformer.h[0].mlp.c_fc.weight[:, 3] == 7).all())


class TestCoupled:
    def entries(self, arch: str) -> list[tuple[str, int, list[int]]]:
        model = tiny(arch)
        names = {module: name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
        found = coupled(model, find_sites(model)[0], KEPT)
        return [(f"{names[e.module]}.{e.name}", e.axis, e.index.tolist()) for e in found]

    def test_separate_with_biases(self) -> None:
        assert self.entries("llama_bias") == [
            ("gate_proj.weight", 0, [1, 5]),
            ("gate_proj.bias", 0, [1, 5]),
            ("up_proj.weight", 0, [1, 5]),
            ("up_proj.bias", 0, [1, 5]),
            ("down_proj.weight", 1, [1, 5]),
        ]

    def test_fused(self) -> None:
        both = [1, 5, 1 + D_FF, 5 + D_FF]
        assert self.entries("phi3") == [("gate_up_proj.weight", 0, both), ("down_proj.weight", 1, [1, 5])]

    def test_transposed(self) -> None:
        assert self.entries("gpt2") == [
            ("c_fc.weight", 1, [1, 5]),
            ("c_fc.bias", 0, [1, 5]),
            ("c_proj.weight", 0, [1, 5]),
        ]


class TestErrors:
    def test_a_site_of_another_model(self, llama: Any) -> None:
        site = replace(find_sites(llama)[0], down="c_proj")
        with pytest.raises(LayoutError, match=r"model.layers.0.mlp.c_proj is not in this model; the site or plan was"):
            down_projection(llama, site)
        assert isinstance(projection(llama, site, "up_proj"), nn.Linear)

    def test_offloaded(self, llama: Any) -> None:
        site = find_sites(llama)[0]
        check_resident(llama, site)
        llama.model.layers[0].mlp.up_proj.to("meta")
        message = r"the weights of model.layers.0.mlp.up_proj are offloaded \(or were never loaded\) and cannot be"
        with pytest.raises(ModelError, match=message):
            weights_of(llama, site)
