"""What the scripts of this folder share: arguments, model, windows, and how a result is handed back.

They run inside the environment of one peer package, without ffnscope.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--windows", type=Path, required=True, help="safetensors with input_ids [n, T]")
    parser.add_argument("--method", required=True)
    parser.add_argument("--sparsity", required=True, help="fraction, or N:M")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    return parser.parse_args()


def load_model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def batches(path: Path, size: int, every: int = 1) -> list[dict[str, torch.Tensor]]:
    """Batches of every so many-th window."""
    ids = load_file(path)["input_ids"][::every]
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(size)]


def save(model, out: Path, package: str, start: float, **facts) -> None:
    """Save a stock checkpoint, and beside it what made it."""
    seconds = time.perf_counter() - start
    model.save_pretrained(out, **facts.pop("save_options", {}))
    made = {"package": package, "version": version(package), "seconds": seconds, **facts}
    (out / "made.json").write_text(json.dumps(made))
