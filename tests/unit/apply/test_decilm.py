from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import ffnscope
from checkpoints import small_tokenizer
from ffnscope.apply.decilm import save_decilm
from ffnscope.apply.export import prune_
from ffnscope.errors import ArtifactError, NotAvailableError
from ffnscope.types import PruningPlan
from reference import text
from tiny import logits, tiny

MakePlan = Callable[..., PruningPlan]
WINDOWS = text(32)


@pytest.mark.parametrize(("arch", "allocator"), [("llama", "global"), ("llama", "local"), ("mistral", "global")])
def test_what_vllm_reads(arch: str, allocator: str, random_plan: MakePlan, tmp_path: Path) -> None:
    """The attributes and tensors that ``DeciLMForCausalLM`` of vLLM asks for, read as it reads them."""
    model = tiny(arch, **({"sliding_window": None} if arch == "mistral" else {}))
    plan = random_plan(model, 0.51, allocator=allocator)
    save_decilm(prune_(model, plan), small_tokenizer(), tmp_path / "out", plan=plan)
    config: Any = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.architectures == ["DeciLMForCausalLM"] and config.model_type == "nemotron-nas"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert len(config.block_configs) == config.num_hidden_layers
    for i, (block, width) in enumerate(zip(config.block_configs, plan.widths.values(), strict=True)):
        assert block.attention.no_op is False and block.ffn.no_op is False
        heads = config.num_attention_heads // block.attention.n_heads_in_group
        assert tensors[f"model.layers.{i}.self_attn.k_proj.weight"].shape == (heads * config.head_dim, 32)
        assert not hasattr(block.ffn, "ffn_mult")
        assert block.ffn.intermediate_size == width
        assert tensors[f"model.layers.{i}.mlp.gate_proj.weight"].shape == (width, 32)
        assert tensors[f"model.layers.{i}.mlp.up_proj.weight"].shape == (width, 32)
        assert tensors[f"model.layers.{i}.mlp.down_proj.weight"].shape == (32, width)
    assert config.rope_parameters["rope_theta"] and config.rms_norm_eps and config.hidden_act == "silu"
    again = type(config).from_dict(json.loads(config.to_json_string()))
    assert [b.ffn.intermediate_size for b in again.block_configs] == list(plan.widths.values())
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"configuration_decilm.py", "ffnscope_plan.json", "tokenizer.json", "README.md"} <= names
    assert "modeling_ffnscope.py" not in names
    assert "vllm serve out --trust-remote-code" in (tmp_path / "out" / "README.md").read_text()


def test_a_bias_compensation(random_plan: MakePlan, tmp_path: Path) -> None:
    """vLLM's DeciLM builds its FFNs as those of a Llama, with biases where the config has ``mlp_bias``."""
    model = tiny("llama")
    plan, stats = random_plan(model, 0.51, allocator="global"), ffnscope.collect(model, WINDOWS, ["act_sum"])
    made = ffnscope.compensate_bias(model, plan, stats)
    with torch.no_grad(), ffnscope.reconstructed(model, made):
        expected = logits(model)
    save_decilm(ffnscope.reconstruct_(model, made), small_tokenizer(), tmp_path / "out", plan=made.told_plan)
    config: Any = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.mlp_bias is True
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for i, (site, bias) in enumerate(made.bias.items()):
        assert torch.equal(tensors[f"model.layers.{i}.mlp.down_proj.bias"], bias), site.name
        for name in ("gate", "up"):
            zero = tensors[f"model.layers.{i}.mlp.{name}_proj.bias"]
            assert zero.shape == (plan.widths[site],) and not zero.any()
    assert "mean bias" in (tmp_path / "out" / "README.md").read_text()
    again = tiny("llama", mlp_bias=True)  # as a loader builds it: widths by layer, biases by the config
    for i, block in enumerate(config.block_configs):
        mlp = again.model.layers[i].mlp
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = tensors[f"model.layers.{i}.mlp.{name}.weight"]
            setattr(mlp, name, torch.nn.Linear(weight.shape[1], weight.shape[0], bias=config.mlp_bias))
        assert mlp.gate_proj.out_features == block.ffn.intermediate_size
    again.load_state_dict(tensors, strict=not config.tie_word_embeddings)
    assert torch.allclose(logits(again), expected, atol=1e-5)


def test_transformers_does_not_take_it_for_a_llama(llama: Any, random_plan: MakePlan, tmp_path: Path) -> None:
    save_decilm(prune_(llama, random_plan(llama)), None, tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)


@pytest.mark.parametrize(("arch", "found"), [("gpt2", "GPT2LMHeadModel"), ("qwen2", "Qwen2ForCausalLM")])
def test_other_families(arch: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(
        NotAvailableError, match=f"'decilm' is for LlamaForCausalLM and Mistral.* this model is a {found}"
    ):
        save_decilm(tiny(arch), None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_sliding_window(tmp_path: Path) -> None:
    with pytest.raises(NotAvailableError, match="is a MistralForCausalLM with a sliding window"):
        save_decilm(tiny("mistral", sliding_window=8), None, tmp_path / "out")


def test_what_exists_is_kept(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="already exists"):
        save_decilm(llama, None, tmp_path)
