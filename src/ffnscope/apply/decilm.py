"""Export Llama-like models of different FFN widths in the form that vLLM builds as ``DeciLMForCausalLM``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ffnscope.apply.card import model_card
from ffnscope.apply.export import SHARD, check_shard_size, read_config, write_card, write_checkpoint, write_config
from ffnscope.apply.folder import replacing_folder
from ffnscope.apply.widths import stock_class
from ffnscope.errors import NotAvailableError
from ffnscope.ffn.load import quiet_transformers
from ffnscope.ffn.sites import find_sites
from ffnscope.types import EvalResult, PruningPlan

ARCHITECTURE = "DeciLMForCausalLM"
CONFIGURATION = Path(__file__).with_name("configuration_decilm.py")
LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM")


def save_decilm(
    model: nn.Module,
    tokenizer: Any,
    path: Path,
    *,
    plan: PruningPlan | None = None,
    results: Mapping[str, Sequence[EvalResult]] | None = None,
    max_shard_size: str = SHARD,
    overwrite: bool = False,
) -> None:
    """Save a Llama-like model for vLLM: weights under Llama's names, and the width of every layer in ``block_configs``.

    `transformers` has no such model, so only vLLM loads it (``--trust-remote-code``, for the config class that lies
    beside the weights). Checked against vLLM's published source, not against a running vLLM. Arguments and errors as
    in `save_model`.

    Raises:
        NotAvailableError: not a Llama-like model (see `check_llama_like`).
    """
    check_shard_size(max_shard_size)
    check_llama_like(model, "decilm")
    blocks = _blocks(model)
    with replacing_folder(path, overwrite) as part, quiet_transformers():
        write_checkpoint(part, model, tokenizer, plan, max_shard_size)
        config = {
            **read_config(part),
            "architectures": [ARCHITECTURE],
            "model_type": "nemotron-nas",
            "auto_map": {"AutoConfig": f"{CONFIGURATION.stem}.DeciLMConfig"},
            "block_configs": blocks,
        }
        write_config(part, config)
        shutil.copyfile(CONFIGURATION, part / CONFIGURATION.name)
        loading = f"    vllm serve {path.name} --trust-remote-code\n"
        write_card(part, model_card(model, path.name, loading, plan, results or {}))


def check_llama_like(model: nn.Module, form: str) -> None:
    """Raise NotAvailableError unless a model is a Llama, or a Mistral without a sliding window."""
    name = stock_class(model).__name__
    config: Any = model.config
    if name not in LLAMA_LIKE or getattr(config, "sliding_window", None) is not None:
        window = " with a sliding window" if name in LLAMA_LIKE else ""
        raise NotAvailableError(
            f"the format {form!r} is for {' and '.join(LLAMA_LIKE)} without a sliding window; this model is a "
            f"{name}{window}. Save in the format 'transformers'."
        )


def _blocks(model: nn.Module) -> list[dict[str, Any]]:
    config: Any = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    return [
        {
            "attention": {"no_op": False, "n_heads_in_group": group},
            # no ffn_mult: where it is present, vLLM derives the width from it
            "ffn": {"no_op": False, "intermediate_size": site.d_ff},
        }
        for site in find_sites(model)
    ]
