"""Checkpoints whose FFNs have different widths: their key in config.json and their modeling file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

AUTO = "AutoModelForCausalLM"
NARROWED = "ffnscope_narrowed"
MODELING = Path(__file__).with_name("modeling_ffnscope.py")


def causal_lm(config: Any) -> Any:
    """Class whose ``from_pretrained`` loads a checkpoint of this config: our own where widths differ, else Auto.

    Code that lies beside the weights is not run: the modeling file of this package is the same.
    """
    from transformers import AutoModelForCausalLM

    if not hasattr(config, NARROWED):
        return AutoModelForCausalLM
    from ffnscope.ffn import modeling_ffnscope

    return getattr(modeling_ffnscope, config.auto_map[AUTO].rpartition(".")[2])
