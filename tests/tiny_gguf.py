"""A GGUF file of a tiny Llama, written as converters write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from tiny import D_FF, HEADS, HIDDEN, LAYERS, VOCAB

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, model: Any) -> None:
    """Write ``tiny("llama")`` in float32, with a byte-level tokenizer of one merge."""
    writer = gguf.GGUFWriter(path, "llama")
    _write_facts(writer, model.config)
    _write_tokenizer(writer)
    heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": model.config.num_key_value_heads}
    for name, value in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem in _TOP:
            target = _TOP[stem]
        else:
            layer, part = stem.removeprefix("model.layers.").split(".", 1)
            target = f"blk.{layer}.{_BLOCK[part]}"
            value = _interleaved(value, heads[part]) if part in heads else value
        writer.add_tensor(f"{target}.weight", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_facts(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(D_FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_file_type(0)


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    names = ["<unk>", "<s>", "</s>", "AB"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(names + [chr(33 + i) for i in range(VOCAB - len(names))])
    writer.add_token_types([3, 3, 3] + [1] * (VOCAB - 3))
    writer.add_token_merges(["A B"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of rotary pairs side by side, as this format has them."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
