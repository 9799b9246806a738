from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ffnscope.apply.slice import slice_
from ffnscope.apply.widths import fit_config, narrowing, stock_class
from ffnscope.errors import ModelError
from ffnscope.types import PruningPlan
from tiny import tiny
from tiny_all import tiny_causal_lm

MakePlan = Callable[..., PruningPlan]

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
HYBRID = {**SMALL, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
MOE = {**SMALL, "num_key_value_heads": 2, "moe_intermediate_size": 16, "intermediate_size": 48, "n_routed_experts": 4}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPS = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
GEMMA = {"head_dim": 8, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}
SPARSE = {"laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0], "layer_types": ["full_attention"] * 2}


def dense_and_narrow(model_type: str, dense: dict[str, Any], narrow: dict[str, Any]) -> Any:
    """A model built narrow, whose config says that it is dense, as after a slice."""
    config = AutoConfig.for_model(model_type, **{**dense, **narrow})
    model = AutoModelForCausalLM.from_config(config)
    model.config = AutoConfig.for_model(model_type, **dense)
    return model


@pytest.mark.parametrize(
    ("model_type", "dense", "narrow"),
    [
        ("llama", {**SMALL, "intermediate_size": 48}, {"intermediate_size": 36}),
        ("llama", {**SMALL, "intermediate_size": 32}, {"intermediate_size": 20}),  # d_ff = d_model
        ("opt", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}, {"ffn_dim": 36}),
        ("gpt2", {**SMALL, "n_inner": None}, {"n_inner": 96}),
        ("phi3", {**SMALL, "intermediate_size": 48, "pad_token_id": 0}, {"intermediate_size": 36}),
        ("recurrent_gemma", {**SMALL, "lru_width": 32, "intermediate_size": 96}, {"intermediate_size": 72}),
        ("moshi", {**SMALL, "ffn_dim": 96}, {"ffn_dim": 72}),
        ("gpt_neox_japanese", {**SMALL, "intermediate_multiple_size": 4}, {"intermediate_multiple_size": 3}),
        ("deepseek_v3", {**MOE, **LATENT, **GROUPS}, {"moe_intermediate_size": 12, "intermediate_size": 36}),
        ("deepseek_v3", {**MOE, **LATENT, **GROUPS, "n_shared_experts": 2}, {"moe_intermediate_size": 12}),
        (
            "gemma3n_text",
            {**SMALL, **GEMMA, **SPARSE, "num_key_value_heads": 2, "intermediate_size": [48, 48]},
            {"intermediate_size": [36, 20]},
        ),
    ],
)
def test_the_field_is_found_by_trial(model_type: str, dense: dict[str, Any], narrow: dict[str, Any]) -> None:
    model = dense_and_narrow(model_type, dense, narrow)
    assert narrowing(model)
    assert fit_config(model)
    assert {name: getattr(model.config, name) for name in narrow} == narrow
    assert narrowing(model) == {}
    rest = AutoConfig.for_model(model_type, **{**dense, **narrow}).to_dict()
    assert {k: v for k, v in model.config.to_dict().items() if rest.get(k) != v and k != "dtype"} == {}


def test_a_derived_width_is_switched_off() -> None:
    derived = {**HYBRID, "intermediate_size": 72, "block_multiple_of": 16}  # 2/3 of it: 48
    model = dense_and_narrow("lfm2", derived, {"intermediate_size": 30, "block_auto_adjust_ff_dim": False})
    assert fit_config(model)
    assert (model.config.intermediate_size, model.config.block_auto_adjust_ff_dim) == (30, False)


def test_a_width_that_is_rounded_up_from_a_factor(random_plan: MakePlan) -> None:
    model = tiny_causal_lm("xlstm")
    (d_ff, *_) = {s.d_ff for s in random_plan(model).kept}
    slice_(model, random_plan(model, 0.3))
    assert model.config.ffn_round_up_to_multiple_of == 1
    assert narrowing(model) == {}
    assert model.backbone.blocks[0].ffn.proj_down.in_features < d_ff


def test_a_sub_config() -> None:
    text = {**SMALL, "head_dim": 8, "num_key_value_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = {"vision_config": vision, "mm_tokens_per_image": 4}
    config = AutoConfig.for_model("gemma3", text_config={**text, "intermediate_size": 36}, **parts)
    model = AutoModelForCausalLM.from_config(config)
    if model.config.get_text_config() is model.config:
        pytest.skip("this version builds the text model alone")
    model.config = AutoConfig.for_model("gemma3", text_config={**text, "intermediate_size": 48}, **parts)
    assert fit_config(model)
    assert model.config.text_config.intermediate_size == 36
    assert model.config.vision_config.intermediate_size == 48


class TestWhatNoFieldExpresses:
    def test_different_widths(self, llama: Any, random_plan: MakePlan) -> None:
        plan = random_plan(llama, 0.51, allocator="global")
        slice_(llama, plan)
        before = llama.config.to_dict()
        assert not fit_config(llama)
        assert llama.config.to_dict() == before
        first, second = plan.widths.values()
        found = narrowing(llama)
        assert found["model.layers.0.mlp.gate_proj.weight"] == [first, 32]
        assert found["model.layers.1.mlp.down_proj.weight"] == [32, second]
        assert found["model.layers.1.mlp.down_proj.in_features"] == second
        assert found["model.layers.1.mlp.intermediate_size"] == second
        assert len(found) == 2 * (3 + 3 + 1)

    def test_many_layers_are_not_searched_by_every_pair(self, random_plan: MakePlan, monkeypatch: Any) -> None:
        model = tiny("llama", num_hidden_layers=12)
        built: list[int] = []
        make = type(model).__init__
        monkeypatch.setattr(type(model), "__init__", lambda self, config: (built.append(1), make(self, config))[1])
        slice_(model, random_plan(model, 0.51, allocator="global"))
        assert len(built) < 5

    def test_a_width_in_the_code(self, random_plan: MakePlan) -> None:
        model = tiny("bloom")
        slice_(model, random_plan(model))
        assert not fit_config(model)
        assert narrowing(model)["transformer.h.0.mlp.dense_h_to_4h.bias"] == [36]

    def test_a_model_with_other_parameters(self, llama: Any) -> None:
        llama.model.layers[0].extra = nn.Linear(2, 2)
        assert not fit_config(llama)
        with pytest.raises(ModelError, match=r"other parameters than its config builds \(model.layers.0.extra.bias\)"):
            narrowing(llama)

    def test_a_config_that_builds_nothing(self, llama: Any) -> None:
        llama.config.num_attention_heads = 0
        with pytest.raises(ModelError, match="LlamaForCausalLM cannot be built from its config"):
            narrowing(llama)


def test_nothing_to_do_changes_nothing(llama: Any) -> None:
    torch.manual_seed(3)
    random, before = torch.get_rng_state(), {k: v.clone() for k, v in llama.state_dict().items()}
    config = llama.config.to_dict()
    assert fit_config(llama) and narrowing(llama) == {}
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())
    assert llama.config.to_dict() == config
    assert stock_class(llama) is type(llama)
