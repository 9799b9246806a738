"""What a model costs by its weights and shapes: parameters, bytes, FLOPs; nothing is timed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffnscope.calibrate.forward import input_device
from ffnscope.errors import NotAvailableError, UsageError
from ffnscope.evaluate.expert_costs import ActiveExperts, expert_costs
from ffnscope.evaluate.forward import evaluating
from ffnscope.ffn.load import LoadedModel
from ffnscope.ffn.projection import coupled, is_projection, reuse, weights_of
from ffnscope.io import read_json
from ffnscope.types import FFNSite


@dataclass(frozen=True, slots=True)
class Work:
    """What is computed: ``batch_size`` prompts of ``prompt_length`` tokens, then ``new_tokens`` tokens after each."""

    batch_size: int = 1
    prompt_length: int = 256
    new_tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("batch_size", "prompt_length", "new_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1; got {getattr(self, name)}.")


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of one model, exact integers.

    Attributes:
        parameters: weights and biases, shared ones counted once.
        ffn_parameters: those of the FFNs' projections.
        parameter_bytes: bytes of all parameters in memory.
        read_bytes: bytes of the parameters that one decode step reads: all but the embedding tables, in which it looks
            up one row. A table that is also the LM head is read as that. Of experts, those that ``experts`` tells.
        prefill_flops: floating point operations of the prompts.
        decode_flops: floating point operations of all new tokens.
        experts: which experts bytes and FLOPs count; None for a model without.
    """

    parameters: int
    ffn_parameters: int
    parameter_bytes: int
    read_bytes: int
    prefill_flops: int
    decode_flops: int
    experts: ActiveExperts | None = None


def count_costs(model: nn.Module, sites: Sequence[FFNSite], work: Work) -> Costs:
    """Count what a causal LM costs.

    FLOPs are those of matrix products, 2 per multiply and add: every projection for every token, the LM head as
    `last_logits` says, and attention over the query-key pairs that a causal mask allows, with queries and keys of all
    heads. Norms, activation functions, softmax and position codes are left out. A token is multiplied with as many
    experts as it is routed to; every other projection is taken to run once per token, so models that repeat layers are
    not for this count.

    Args:
        model: a `transformers` causal LM; run on a few tokens to see its KV cache and its routing, and left as it was.
        sites: all its FFNs.
        work: what is computed.

    Raises:
        NotAvailableError: an FFN that several layers share, experts that were not found, no KV cache, or a number of
            attention heads that differs by layer.
        LayoutError: it cannot be told which tokens an expert is given.
    """
    _check_used_once(model, sites)
    body, head = _matrix_entries(model)
    experts = expert_costs(model, sites, work.batch_size)
    if experts is not None:
        modules = any(not s.stacked for s in sites if s.expert is not None)  # these are among the model's projections
        body += experts.active_entries - (experts.entries if modules else 0)
    pair = _attention_flops_per_pair(model)
    n, new, batch = work.prompt_length, work.new_tokens, work.batch_size
    head_rows = 1 if last_logits(model) else n
    prefill = 2 * (body * n + head * head_rows) + pair * _pairs(0, n)
    decode = 2 * (body + head) * new + pair * _pairs(n, new)
    return Costs(
        parameters=sum(p.numel() for p in model.parameters()),
        ffn_parameters=sum(ffn_parameters(model, site) for site in sites),
        parameter_bytes=sum(p.nbytes for p in model.parameters()),
        read_bytes=step_bytes(model) - (0 if experts is None else experts.idle_bytes),
        prefill_flops=batch * prefill,
        decode_flops=batch * decode,
        experts=None if experts is None else experts.active,
    )


def _check_used_once(model: nn.Module, sites: Sequence[FFNSite]) -> None:
    shared = next((site for site in sites if site.n_uses > 1), None)
    if shared is not None:
        raise NotAvailableError(
            f"{shared.name} of {type(model).__name__} {reuse(shared)}; FLOPs and bytes are available "
            "for models whose parameters are each used once per token."
        )


def ffn_parameters(model: nn.Module, site: FFNSite) -> int:
    """Parameters of one FFN: its projections with their biases, adapters' outputs, and a norm before down."""
    bias = weights_of(model, site).down_bias
    return site.d_ff * channel_parameters(model, site) + (0 if bias is None else bias.numel())


def channel_parameters(model: nn.Module, site: FFNSite) -> int:
    """Parameters that one channel is made of: its rows of gate and up, its column of down, and what else is coupled."""
    first = torch.zeros(1, dtype=torch.int64)
    entries = {id(getattr(e.module, e.name)): e for e in coupled(model, site, first)}  # shared ones count once
    return sum(e.index.numel() * e.parameter.numel() // e.parameter.shape[e.axis] for e in entries.values())


def last_logits(model: nn.Module) -> dict[str, int]:
    """Argument that asks a model for the logits of the last token only, as generation does; empty if it has none."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def file_bytes(loaded: LoadedModel) -> int | None:
    """Bytes of the weight files that a model was loaded from; None when they are not on this machine's disk.

    Those of safetensors where there are any (the shards that the index names), else of ``pytorch_model*.bin``. A GGUF
    counts as the safetensors that it was converted to.
    """
    folder = _folder(loaded)
    if folder is None:
        return None
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [folder / name for name in set(read_json(index)["weight_map"].values())]
    else:
        files = [folder / "model.safetensors"]
    found = [file for file in files if file.exists()] or list(folder.glob("pytorch_model*.bin"))
    return sum(file.stat().st_size for file in found) or None


def _folder(loaded: LoadedModel) -> Path | None:
    """Folder of a checkpoint; for a hub id the snapshot in the cache, which loading has filled."""
    if Path(loaded.origin).is_dir():
        return Path(loaded.origin)
    from huggingface_hub import try_to_load_from_cache

    source = loaded.source
    place: Any = {"revision": loaded.revision or source.revision, "cache_dir": source.cache_dir}
    config = try_to_load_from_cache(loaded.origin, "config.json", **place)
    return Path(config).parent if isinstance(config, str) else None


def _matrix_entries(model: Any) -> tuple[int, int]:
    """Entries of all projections but the LM head, and of the LM head."""
    output = model.get_output_embeddings()
    every = sum(m.weight.numel() for m in model.modules() if is_projection(m) or _is_router(m))
    head = output.weight.numel() if output is not None and is_projection(output) else 0
    return every - head, head


def _is_router(module: Any) -> bool:
    """Whether a module that is no projection chooses experts by a matrix of its own."""
    weight = getattr(module, "weight", None)
    named = type(module).__name__.lower().endswith(("router", "gate"))
    return named and not is_projection(module) and isinstance(weight, nn.Parameter) and weight.dim() == 2


def step_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that one decode step reads: all but the embedding tables, in which it looks up rows."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    multiplied = {id(m.weight) for m in model.modules() if is_projection(m)}
    return sum(p.nbytes for p in model.parameters() if id(p) not in tables - multiplied)


def _pairs(past: int, new: int) -> int:
    """Query-key pairs of ``new`` tokens after ``past`` ones: each sees the earlier ones and itself."""
    return new * past + new * (new + 1) // 2


def _attention_flops_per_pair(model: Any) -> int:
    """FLOPs of one query-key pair over all layers and heads: a product of keys' width, and one of values' width."""
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise NotAvailableError(
            f"the config of {type(model).__name__} gives num_attention_heads as {heads!r}; FLOPs of attention are "
            "available for models with one number of heads."
        )
    return sum(2 * heads * (keys.shape[-1] + values.shape[-1]) for keys, values in _layers_of_cache(model))


def _layers_of_cache(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids = torch.zeros(1, 2, dtype=torch.int64, device=input_device(model))
    with evaluating(model), torch.inference_mode():
        return cached(model, model(input_ids=ids, use_cache=True).get("past_key_values"))


def cached(model: nn.Module, cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [batch, heads, tokens, width] of every attention layer in a cache of `transformers`.

    Raises:
        NotAvailableError: the model keeps no keys and values.
    """
    layers = getattr(cache, "layers", [])
    found = [(layer.keys, layer.values) for layer in layers if isinstance(getattr(layer, "keys", None), torch.Tensor)]
    if not found:
        raise NotAvailableError(
            f"{type(model).__name__} returned no KV cache (past_key_values with keys and values); decoding token by "
            "token is available only for models that keep one."
        )
    return found
