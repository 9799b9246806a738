"""A tiny random model of every causal LM that `transformers` maps: rules by the names of config fields, few exceptions.

Widths tell what a tensor is: residual stream 64, dense FFN 168, a second kind of dense FFN 144, routed expert 56,
shared expert 88, vocabulary 128.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor

from tiny import redraw

VOCAB, HIDDEN, D_FF, SECOND, EXPERT, SHARED, HEADS, LAYERS = 128, 64, 168, 144, 56, 88, 4, 3
HEAD = HIDDEN // HEADS
TOO_LARGE = 30_000_000  # parameters; more means that a rule is missing

# (value, config fields); a field is set when the config class declares it
_RULES: tuple[tuple[int, str], ...] = (
    (VOCAB, "vocab_size"),
    (
        HIDDEN,
        "hidden_size d_model n_embd embedding_size word_embed_proj_dim input_embedding_size output_embedding_size "
        "emb_dim dim_model lru_width max_position_embeddings n_positions model_max_length max_seq_len n_ctx "
        "context_length max_target_positions max_source_positions",
    ),
    (
        D_FF,
        "intermediate_size ffn_dim ffn_hidden_size d_inner dff dim_ff feed_forward_size decoder_ffn_dim "
        "encoder_ffn_dim n_inner",
    ),
    (SECOND, "dense_intermediate_size prefix_dense_intermediate_size intermediate_size_mlp"),
    (EXPERT, "moe_intermediate_size expert_ffn_hidden_size"),
    (
        SHARED,
        "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers "
        "num_decoder_layers num_blocks",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "attention_heads num_encoder_attention_heads num_decoder_attention_heads linear_num_value_heads "
        "linear_num_heads num_experts num_local_experts n_routed_experts moe_num_experts",
    ),
    (
        2,
        "num_key_value_heads linear_num_key_heads index_n_heads mamba_expand num_experts_per_tok num_experts_per_token "
        "moe_topk moe_k top_k_experts moe_top_k eos_token_id",
    ),
    (
        HEAD,
        "head_dim d_head global_head_dim attention_head_size v_head_dim qk_nope_head_dim mamba_d_head "
        "mamba_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim",
    ),
    (
        8,
        "qk_rope_head_dim mamba_n_heads mamba_num_heads mamba_d_state mamba_chunk_size state_size ssm_state_size "
        "time_step_rank chunk_size index_topk rotary_dim sliding_window attention_window_size sliding_window_size "
        "window_size local_attention",
    ),
    (24, "kv_lora_rank"),
    (32, "q_lora_rank"),
    (
        0,
        "pad_token_id num_nextn_predict_layers num_mtp_layers hidden_dropout_prob attention_probs_dropout_prob dropout "
        "attention_dropout activation_dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout layerdrop "
        "decoder_layerdrop encoder_layerdrop",
    ),
    (
        1,
        "n_group topk_group num_expert_group first_k_dense_replace num_dense_layers mamba_n_groups bos_token_id "
        "decoder_start_token_id",
    ),
    (3, "sep_token_id"),
    (4, "cls_token_id"),
    (5, "mask_token_id"),
    (6, "unk_token_id"),
)
# features that a default of None leaves off, or ties to another field
_OFF_WHEN_NONE = (
    "sliding_window",
    "q_lora_rank",
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "moe_intermediate_size",
    "top_k_experts",
    "num_experts",
    "prefix_dense_intermediate_size",
    "n_group",
    "topk_group",
)
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
UNSET = "unset"
_LINEAR, _FULL = "linear_attention", "full_attention"
_DOTS3_WINDOWS = {
    f"swa_{k}": v
    for k, v in {
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "q_lora_rank": 32,
        "kv_lora_rank": 24,
        "head_dim": 24,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    }.items()
}

# model_type -> values that win over the rules; a dict is a sub-config
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "vocab_size": 260,
        "patching_mode": "entropy",
        "encoder_config": {"hidden_size_global": HIDDEN},
        "decoder_config": {"hidden_size_global": HIDDEN},
    },
    "cohere_compass_text": {"rope_parameters": {_FULL: {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": EXPERT},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_audio_encoder": {"adapter_out_dim": HIDDEN},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention", "sliding_attention"],
        "head_dim": 24,
        **_DOTS3_WINDOWS,
    },
    "dots3_note_vision_encoder": {"adapter_out_dim": HIDDEN},
    "falcon_h1": {"mamba_d_ssm": 128},
    "falcon_mamba": {"intermediate_size": UNSET},
    "gemma3n": {"audio_config": {"vocab_size": 8, "vocab_offset": VOCAB - 8}},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16,
        "layer_types": ["sliding_attention", _FULL] * 2,
        "laurel_rank": 8,
        "intermediate_size": [D_FF] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "gemma4_assistant": {
        "backbone_hidden_size": HIDDEN,
        "num_centroids": 16,
        "centroid_intermediate_top_k": 4,
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": LAYERS,
        },
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16,
        "layer_types": ["sliding_attention", _FULL, _FULL],
    },
    "gemma4_unified": {
        "vision_config": {"mm_embed_dim": HIDDEN, "mm_posemb_size": 16, "output_proj_dims": HIDDEN, "patch_size": 4}
    },
    "gemma4_unified_assistant": {
        "backbone_hidden_size": HIDDEN,
        "num_centroids": 16,
        "centroid_intermediate_top_k": 4,
        "text_config": {"num_kv_shared_layers": LAYERS},
    },
    "gemma4_unified_text": {"layer_types": ["sliding_attention", _FULL, _FULL]},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "hrm_text": {
        "num_hidden_layers": UNSET,
        "num_layers_per_stack": 1,
        "H_cycles": 1,
        "L_cycles": 1,
        "L_bp_cycles": [1],
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "lfm2": {"block_auto_adjust_ff_dim": False, "block_multiple_of": 16},
    "lfm2_moe": {"layer_types": ["conv", _FULL, "conv"]},
    "longcat_flash": {"zero_expert_num": 2, "head_dim": 8, "num_layers": 2},
    "mamba": {"intermediate_size": UNSET},
    "mamba2": {"num_heads": 8},
    "moshi": {"num_codebooks": 2},
    "mpt": {"attn_pdrop": UNSET, "attn_config": {"attn_pdrop": 0}},
    "nemotron_h": {
        "num_hidden_layers": UNSET,
        "layers_block_type": [_LINEAR, "moe", _FULL, "mlp"],
        "n_groups": 2,
    },
    "prophetnet": {"num_buckets": 8, "relative_max_distance": 16},
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "ple_embed_dim": 32,
        "ngram_vocab_size_base": 200,
        "split_ngram_parts": 2,
        "heads_per_ngram": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 48],
        "attn_layers": ["local", "lsh", "local"],
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "rembert": {"input_embedding_size": 32},
    "rwkv": {"attention_hidden_size": HIDDEN},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": [_LINEAR, _LINEAR, "hybrid", _LINEAR, "hybrid"],
        "num_key_value_heads": HEADS,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": [_LINEAR, "hybrid", _LINEAR, "hybrid"],
        "num_key_value_heads": HEADS,
        "adapter_rank": 8,
        "n_mamba_heads": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# towers that the rules do not fit keep their defaults
_AS_THEY_ARE = ("dots3_note_vision_encoder", "dots3_note_audio_encoder")
# name -> (model_type, values): layouts that the defaults do not reach
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "doge, retrieval experts": ("doge", {"is_moe": True}),
    "falcon, two norms": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "gemma3n_text, four widths": (
        "gemma3n_text",
        {"activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [D_FF, SECOND, D_FF, SHARED]},
    ),
    "gemma4_text, double width": (
        "gemma4_text",
        {
            "use_double_wide_mlp": True,
            "num_kv_shared_layers": 1,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", _FULL] * 2,
        },
    ),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "granitemoehybrid, dense": ("granitemoehybrid", {"num_local_experts": 0}),
    "hrm_text, two cycles": ("hrm_text", {"H_cycles": 2, "L_cycles": 2, "L_bp_cycles": [2, 2]}),
    "lfm2, adjusted width": ("lfm2", {"block_auto_adjust_ff_dim": True}),
    "llama, biases": ("llama", {"mlp_bias": True}),
    "mllama, cross attention": ("mllama", {"text_config": {"cross_attention_layers": [1]}}),
    "opt, projected embedding": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "zamba2, two blocks": (
        "zamba2",
        {
            "num_mem_blocks": 2,
            "num_hidden_layers": 6,
            "layers_block_type": [_LINEAR, "hybrid", "hybrid"] * 2,
        },
    ),
}


def architectures() -> list[str]:
    """Every model_type of the causal-LM mapping of the installed `transformers`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Build a config by the rules, its exceptions and ``changes``; sub-configs likewise."""
    from transformers import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[model_type]
    values = _values(model_type, kind, changes)
    for name, found in (getattr(kind, "sub_configs", None) or {}).items():
        given = values.get(name, {})
        sub: Any = getattr(found, "config_class", found)
        if given and "model_type" in given:
            sub = CONFIG_MAPPING[given["model_type"]]
        elif sub is None or sub.__name__ == "AutoConfig":
            sub = type(getattr(kind(), name, None))
        if given is None or sub is type(None):
            continue
        tower = _TOWER if any(word in name for word in ("vision", "audio", "vq")) else {}
        ruled = {} if sub.model_type in _AS_THEY_ARE else _values(sub.model_type, sub, _declared_only(sub, tower))
        exceptions = _EXCEPTIONS.get(sub.model_type, {}) if sub.model_type in _AS_THEY_ARE else {}
        values[name] = sub(**{**ruled, **exceptions, **given})
    return kind(**values)


def tiny_causal_lm(name: str, seed: int = 0) -> Any:
    """Build the model of an architecture or variant: float32, in eval mode, weights drawn by `tiny.redraw`."""
    model_type, changes = VARIANTS.get(name, (name, {}))
    torch.manual_seed(seed)
    with torch.device("meta"):
        size = sum(p.numel() for p in _make(model_type, changes).parameters())
    if size > TOO_LARGE:
        raise MemoryError(f"the tiny {name} has {size:,} parameters; a rule for one of its fields is missing")
    return redraw(_make(model_type, changes).float().eval(), seed)


def inputs_of(model: Any, rows: int = 2, length: int = 16, seed: int = 0) -> dict[str, Any]:
    """Token ids [rows, length]; for a model of several codebooks [rows * codebooks, length]."""
    tables = model.get_input_embeddings()
    rows *= len(tables) if isinstance(tables, torch.nn.ModuleList) else 1
    random = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(7, 120, (rows, length), generator=random), "use_cache": False}


def logits_of(model: Any, inputs: dict[str, Any] | None = None) -> Tensor:
    """Logits of a short text; outputs that are tuples hold them first."""
    output = model(**(inputs_of(model) if inputs is None else inputs))
    found = getattr(output, "logits", None)
    return output[0] if found is None else found


def _declared(kind: Any) -> dict[str, Any]:
    """Fields of a config class with their defaults."""
    if dataclasses.is_dataclass(kind):
        return {f.name: f.default for f in dataclasses.fields(kind)}
    return kind().to_dict()


def _declared_only(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k in _declared(kind)}


def _values(model_type: str, kind: Any, changes: dict[str, Any]) -> dict[str, Any]:
    declared = _declared(kind)
    ruled: dict[str, Any] = {name: value for value, names in _RULES for name in names.split()}
    ruled |= {"is_decoder": True, "use_cache": False, "forced_eos_token_id": None, "forced_bos_token_id": None}
    values = {k: v for k, v in ruled.items() if k in declared and not (k in _OFF_WHEN_NONE and declared[k] is None)}
    for name in values:
        if "drop" in name:
            values[name] = float(values[name])
    if {"kv_lora_rank", "num_key_value_heads"} <= set(declared):
        values["num_key_value_heads"] = HEADS  # latent attention has no groups
    values |= {**_EXCEPTIONS.get(model_type, {}), **changes}
    return {k: v for k, v in values.items() if not isinstance(v, str) or v != UNSET}


def _make(model_type: str, changes: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = tiny_config(model_type, **changes)
    if model_type == "gemma3n":
        config.__dict__["vision_config"] = _plain_tower()
    if hasattr(config, "decoder"):  # the mapped class takes the config of the decoder
        module = importlib.import_module(type(config).__module__.rsplit(".", 1)[0])
        return getattr(module, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])._from_config(config.decoder)
    return AutoModelForCausalLM.from_config(config)


def load_arguments(model: Any) -> dict[str, Any]:
    """What loading a saved tiny model needs: a config file cannot name the stand-in for the tower of Gemma 3n."""
    return {"config": model.config} if model.config.model_type == "gemma3n" else {}


def _plain_tower() -> Any:
    """A vision tower that needs no further library."""
    from transformers import ViTConfig

    tower: Any = ViTConfig(**_TOWER, image_size=32, patch_size=16)
    tower.vocab_size, tower.vocab_offset, tower.rms_norm_eps = 8, VOCAB - 16, 1e-6
    return tower
