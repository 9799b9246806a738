from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ffnscope.apply.slice import slice_
from ffnscope.ffn.sites import find_sites
from ffnscope.types import PruningPlan
from tiny import logits, tiny

MakePlan = Callable[..., PruningPlan]


def test_linear_modules_remember_their_new_width(llama: Any, random_plan: MakePlan) -> None:
    assert slice_(llama, random_plan(llama)) is llama
    mlp = llama.model.layers[0].mlp
    assert (mlp.gate_proj.in_features, mlp.gate_proj.out_features) == (32, 36)
    assert (mlp.down_proj.in_features, mlp.down_proj.out_features) == (36, 32)
    assert mlp.intermediate_size == 36
    assert all(p.is_contiguous() for p in llama.parameters())


def test_transposed_modules_remember_their_new_width(random_plan: MakePlan) -> None:
    model = tiny("gpt2")
    slice_(model, random_plan(model))
    mlp = model.transformer.h[0].mlp
    assert (mlp.c_fc.nx, mlp.c_fc.nf, mlp.c_fc.weight.shape) == (32, 36, (32, 36))
    assert (mlp.c_proj.nx, mlp.c_proj.nf, mlp.c_proj.weight.shape) == (36, 32, (36, 32))


def test_fused_halves_keep_their_order(random_plan: MakePlan) -> None:
    model = tiny("phi3")
    plan = random_plan(model)
    module = model.model.layers[1].mlp.gate_up_proj
    gate, up = module.weight.detach().chunk(2)
    slice_(model, plan)
    kept = list(plan.kept.values())[1]
    assert module.out_features == 72
    assert torch.equal(module.weight, torch.cat([gate[kept], up[kept]]))


class TestConfig:
    @pytest.mark.parametrize(
        ("arch", "name"),
        [
            ("llama", "intermediate_size"),
            ("gpt2", "n_inner"),
            ("opt", "ffn_dim"),
            ("falcon", "ffn_hidden_size"),
            ("gpt_neo", "intermediate_size"),
        ],
    )
    def test_the_field_of_the_width(self, arch: str, name: str, random_plan: MakePlan) -> None:
        model = tiny(arch)
        slice_(model, random_plan(model))
        assert getattr(model.config, name) == 36

    @pytest.mark.parametrize(("arch", "name"), [("gpt2", "n_inner"), ("gpt_neo", "intermediate_size")])
    def test_a_width_that_is_not_set(self, arch: str, name: str, random_plan: MakePlan) -> None:
        model = tiny(arch, **{name: None})
        assert {s.d_ff for s in find_sites(model)} == {128}
        slice_(model, random_plan(model))
        assert getattr(model.config, name) == 96

    def test_a_stray_field_does_not_hide_the_real_one(self, random_plan: MakePlan) -> None:
        model = tiny("falcon", intermediate_size=48)
        slice_(model, random_plan(model))
        assert (model.config.ffn_hidden_size, model.config.intermediate_size) == (36, 48)

    def test_unequal_widths_leave_it(self, llama: Any, random_plan: MakePlan) -> None:
        plan = random_plan(llama, 0.51, allocator="global")
        slice_(llama, plan)
        assert llama.config.intermediate_size == 48
        assert [s.d_ff for s in find_sites(llama)] == list(plan.widths.values())
        assert logits(llama).isfinite().all()

    def test_the_last_of_two_halves_brings_it(self, llama: Any, random_plan: MakePlan) -> None:
        whole = random_plan(llama)
        for n, (site, kept) in enumerate(whole.kept.items()):
            assert llama.config.intermediate_size == 48
            slice_(llama, replace(whole, kept={site: kept}))
            assert llama.config.intermediate_size == (48, 36)[n]


def test_flags_of_parameters_stay(llama: Any, random_plan: MakePlan) -> None:
    llama.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = {n: p.requires_grad for n, p in llama.named_parameters()}
    slice_(llama, random_plan(llama))
    assert {n: p.requires_grad for n, p in llama.named_parameters()} == before
    llama(input_ids=torch.tensor([[1, 2]]), use_cache=False).logits.sum().backward()
    assert llama.model.layers[1].mlp.up_proj.weight.grad.shape == (36, 32)


def test_the_plan_does_not_change(llama: Any, random_plan: MakePlan) -> None:
    plan = random_plan(llama)
    before = {s: k.clone() for s, k in plan.kept.items()}
    slice_(llama, plan)
    assert all(torch.equal(plan.kept[s], k) for s, k in before.items())
