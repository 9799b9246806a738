"""Tiny random mixtures of experts of every kind of layout: hidden 32, experts 16 wide, 4 experts, 2 per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tiny import HEADS, HIDDEN, VOCAB, redraw

EXPERT, SHARED, DENSE, N_EXPERTS, TOP_K = 16, 40, 48, 4, 2

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
_GROUPED = {**_BASE, "num_key_value_heads": 2, "head_dim": 8}
_LOCAL = {"num_local_experts": N_EXPERTS, "num_experts_per_tok": TOP_K}
_ROUTED = {"n_routed_experts": N_EXPERTS, "num_experts_per_tok": TOP_K}
_MIXTRAL = {**_GROUPED, **_LOCAL, "intermediate_size": EXPERT}
_SPARSE = {**_GROUPED, "num_experts": N_EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": EXPERT}
_DEEPSEEK = {
    **_BASE,
    **_ROUTED,
    "num_key_value_heads": HEADS,
    "intermediate_size": DENSE,
    "moe_intermediate_size": EXPERT,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_DBRX = {
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "d_model": HIDDEN,
    "n_heads": HEADS,
    "n_layers": 2,
    "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "ffn_config": {"moe_num_experts": N_EXPERTS, "moe_top_k": TOP_K, "ffn_hidden_size": EXPERT},
}
_NEMOTRON = {
    **{k: v for k, v in _GROUPED.items() if k != "num_hidden_layers"},
    **_ROUTED,
    "layers_block_type": ["moe", "full_attention", "moe", "mlp"],
    "intermediate_size": DENSE,
    "moe_intermediate_size": EXPERT,
    "moe_shared_expert_intermediate_size": SHARED,
    "n_group": 1,
    "topk_group": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
}
_INKLING = {**_SPARSE, **_ROUTED, "intermediate_size": DENSE, "n_shared_experts": 2}

# name -> (model_type, config)
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", _MIXTRAL),
    "olmoe": (
        "olmoe",
        {**_GROUPED, "num_experts": N_EXPERTS, "num_experts_per_tok": TOP_K, "intermediate_size": EXPERT},
    ),
    "phimoe": ("phimoe", _MIXTRAL),
    "granitemoe": ("granitemoe", _MIXTRAL),
    "qwen2_moe": ("qwen2_moe", {**_SPARSE, "intermediate_size": DENSE, "shared_expert_intermediate_size": SHARED}),
    "qwen3_moe": ("qwen3_moe", {**_SPARSE, "intermediate_size": DENSE}),
    "deepseek_v3": ("deepseek_v3", _DEEPSEEK),
    "nemotron_h": ("nemotron_h", _NEMOTRON),
    "gpt_oss": ("gpt_oss", _MIXTRAL),
    "aria_text": (
        "aria_text",
        {**_GROUPED, "intermediate_size": EXPERT, "moe_num_experts": N_EXPERTS, "moe_topk": TOP_K},
    ),
    "llama4_text": ("llama4_text", {**_MIXTRAL, "intermediate_size_mlp": DENSE, "interleave_moe_layer_step": 1}),
    "longcat_flash": (
        "longcat_flash",
        {
            **{k: v for k, v in _DEEPSEEK.items() if k != "intermediate_size"},
            "num_layers": 2,
            "ffn_hidden_size": DENSE,
            "expert_ffn_hidden_size": EXPERT,
            "moe_topk": TOP_K,
            "zero_expert_num": 2,
            "head_dim": 8,
        },
    ),
    "dbrx": ("dbrx", _DBRX),
    "jetmoe": ("jetmoe", {**_BASE, **_LOCAL, "num_key_value_heads": 2, "kv_channels": 8, "intermediate_size": EXPERT}),
    "inkling_text": ("inkling_text", _INKLING),
}


def tiny_moe(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """Build the tiny mixture of one row, in eval mode; ``changes`` are further config values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, row = MIXTURES[name]
    config = AutoConfig.for_model(model_type, **{**row, **changes})
    model = redraw(AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), seed)
    if dtype == torch.float64:
        model.config._experts_implementation = "eager"  # the grouped kernel has no float64
    return _draw_experts(model, seed)


@torch.no_grad()
def _draw_experts(model: nn.Module, seed: int) -> nn.Module:
    """Fused parameters have another fan-in than a matrix, and biases without the name of one."""
    random = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            parameter.copy_(torch.randn(parameter.shape, generator=random) / max(parameter.shape[1:]) ** 0.5)
        elif name.endswith(("_proj_bias", "sinks")):
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
    return model


def up_first(model: Any) -> Any:
    """Let the experts of a Mixtral take the first half of their fused projection as up and the second as gate."""
    experts = type("Turned", (type(model.model.layers[0].mlp.experts),), {"forward": up_first_forward})
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = experts
    return model


def up_first_forward(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The forward of such experts."""
    out = torch.zeros_like(hidden)
    for e in index.unique().tolist():
        chosen, place = (index == e).nonzero(as_tuple=True)
        up, gate = nn.functional.linear(hidden.index_select(0, chosen), self.gate_up_proj[e]).chunk(2, -1)
        part = nn.functional.linear(nn.functional.silu(gate) * up, self.down_proj[e])
        out = out.index_add(0, chosen, part * weights[chosen, place, None])
    return out
