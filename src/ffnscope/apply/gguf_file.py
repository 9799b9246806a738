"""Export Llama-like models of one FFN width as a GGUF file, with the tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.apply.decilm import check_llama_like
from ffnscope.apply.folder import refuse_existing
from ffnscope.apply.gguf_tokenizer import Vocabulary, read_vocabulary
from ffnscope.errors import NotAvailableError
from ffnscope.ffn.offload import names_once, value_of
from ffnscope.ffn.sites import find_sites
from ffnscope.saving import replacing

FFN_BIASES = tuple(f".mlp.{name}_proj.bias" for name in ("gate", "up", "down"))
ALTERNATIVE = "Save in the format 'transformers' and convert that with a converter of llama.cpp."


def save_gguf(model: nn.Module, tokenizer: Any, path: Path, *, overwrite: bool = False) -> None:
    """Save a Llama-like model and its byte-level BPE tokenizer as one GGUF file, in the dtype of the model.

    Norms and biases are float32, as this format has them. Biases of FFNs are written (`compensate_bias`): llama.cpp and
    `load_model` read them, plain `transformers` drops them unless it is given a config with ``mlp_bias``, which a
    `UserWarning` says. The file is not quantised; for kernels that quantise in blocks, prune to
    widths that are multiples of 256.

    Raises:
        ArtifactError: ``path`` exists and ``overwrite`` is not set, or it cannot be written.
        NotAvailableError: unequal widths, another family, biases of attention, scaled rotary embeddings, or another
            tokenizer.
    """
    import gguf

    vocabulary = check_gguf(model, tokenizer)
    widths = {site.d_ff for site in find_sites(model)}
    check_one_width(widths)
    refuse_existing(path, overwrite)
    if any(name.endswith(FFN_BIASES) for name, _ in model.named_parameters()):
        warnings.warn(
            f"{path.name} holds biases of FFNs. llama.cpp and ffnscope read them; plain transformers drops them "
            "without a word, unless it is given a config with mlp_bias.",
            stacklevel=2,
        )
    config: Any = model.config
    kinds, types = gguf.GGMLQuantizationType, gguf.LlamaFileType
    full = kinds.F32, types.ALL_F32
    half = {torch.float16: (kinds.F16, types.MOSTLY_F16), torch.bfloat16: (kinds.BF16, types.MOSTLY_BF16)}
    kind, file_type = half.get(_dtype(model), full)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with replacing(path) as part:
        writer = gguf.GGUFWriter(part, "llama")
        _write_facts(writer, config, widths.pop())
        writer.add_file_type(file_type)
        vocabulary.write(writer)
        for name, value in _tensors(model):
            stored = kind if value.dim() > 1 else kinds.F32
            array = gguf.quants.quantize(value.float().numpy(), stored)
            writer.add_tensor(names.get_name(name, (".weight", ".bias")) or name, array, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def check_gguf(model: nn.Module, tokenizer: Any) -> Vocabulary:
    """Raise NotAvailableError unless `save_gguf` can write this family and tokenizer; returns the tokens."""
    check_llama_like(model, "gguf")
    config: Any = model.config
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise NotAvailableError(
            f"the format 'gguf' is not available for rotary embeddings of type {rope['rope_type']!r}. {ALTERNATIVE}"
        )
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    bias = next((name for name in biases if not name.endswith(FFN_BIASES)), None)
    if bias is not None or config.hidden_act != "silu":
        found = bias or f"activation {config.hidden_act}"
        raise NotAvailableError(f"the format 'gguf' has no place for {found} in a Llama. {ALTERNATIVE}")
    return read_vocabulary(tokenizer, config.vocab_size)


def check_one_width(widths: set[int]) -> None:
    """Raise NotAvailableError when FFNs have different widths, which readers of this format do not load."""
    if len(widths) > 1:
        raise NotAvailableError(
            f"the format 'gguf' has one width for all FFNs; these have {min(widths)} to {max(widths)} channels. Pad to "
            "the widest (--pad-to-widest), or use the allocator 'local'."
        )


def _write_facts(writer: Any, config: Any, width: int) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(width)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file in the layout of this format, on the CPU, read where it is offloaded; no tied head."""
    config: Any = model.config
    once = frozenset(names_once(model))
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.named_parameters():
        if name not in once:
            continue
        value = value_of(model, name, value).detach().cpu()
        part = name.split(".")[-2]
        yield name, _interleaved(value, heads[part]) if part in heads else value


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Put the two rows of every rotary pair side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.dim() > 1)
