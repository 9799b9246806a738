"""Tiny random causal LMs of many architectures: hidden 32, d_ff 48, 2 layers, vocabulary 64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCAB, HIDDEN, D_FF, LAYERS, HEADS = 64, 32, 48, 2, 4

_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON = {
    **_TOKENS,
    "hidden_size": HIDDEN,
    "intermediate_size": D_FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8}
_BLOOM = {**_TOKENS, "hidden_size": 12, "n_layer": LAYERS, "n_head": HEADS}
_GPT2 = {**_TOKENS, "n_embd": HIDDEN, "n_inner": D_FF, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
_OPT = {
    **_TOKENS,
    "hidden_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "ffn_dim": D_FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
_FALCON = {
    **_TOKENS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": D_FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "bias": True,
}
_GPT_NEO = {
    **_TOKENS,
    "hidden_size": HIDDEN,
    "intermediate_size": D_FF,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "attention_types": [[["global", "local"], 1]],
    "max_position_embeddings": 64,
}

# name -> (model_type, config). The name is the model_type unless a variant is meant.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "llama_bias": ("llama", {**_GROUPED, "mlp_bias": True}),
    "llama_relu": ("llama", {**_GROUPED, "hidden_act": "relu"}),
    "mistral": ("mistral", _GROUPED),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 8}),
    "olmo2": ("olmo2", _GROUPED),
    "smollm3": ("smollm3", _GROUPED),
    "gemma": ("gemma", _GEMMA),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3_text": ("gemma3_text", _GEMMA),
    "phi3": ("phi3", _GROUPED),
    "glm": ("glm", {**_GROUPED, "head_dim": 8}),
    "opt": ("opt", _OPT),
    "opt_projected": ("opt", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "phi": ("phi", _COMMON),
    "gpt_neox": ("gpt_neox", _COMMON),
    "gpt_neo": ("gpt_neo", _GPT_NEO),
    "gpt2": ("gpt2", _GPT2),
    "starcoder2": ("starcoder2", _GROUPED),
    "falcon": ("falcon", _FALCON),
    "bert": ("bert", {**_COMMON, "is_decoder": True}),
    "bloom": ("bloom", _BLOOM),
}
FUSED = ("phi3", "glm")
PLAIN = ("opt", "opt_projected", "phi", "gpt_neox", "gpt_neo", "gpt2", "starcoder2", "falcon", "bert", "bloom")


def tiny(arch: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """Build the tiny model of one row, in eval mode; ``changes`` are further config values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, row = ARCHITECTURES[arch]
    config = AutoConfig.for_model(model_type, **{**row, **changes})
    return redraw(AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), seed)


@torch.no_grad()
def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all matrices with std 1 / sqrt(fan in) and biases with std 0.1, so that masking moves the logits visibly."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            transposed = "Conv1D" in type(model.get_submodule(name.rsplit(".", 1)[0])).__name__
            fan_in = parameter.shape[0 if transposed else 1]
            parameter.copy_(torch.randn(parameter.shape, generator=random) / fan_in**0.5)
        elif name.endswith("bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
    return model


def tokens(rows: int = 2, length: int = 16, seed: int = 0) -> Tensor:
    """Random token ids [rows, length] without special tokens."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    """Logits [rows, length, vocabulary] without a cache."""
    ids = tokens() if ids is None else ids
    return model(input_ids=ids, use_cache=False).logits
