"""Tiny models whose weights accelerate keeps elsewhere: in memory, on disk, or one layer in its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tiny import tiny

Make = Callable[[str, Path], Any]


def in_memory(arch: str, folder: Path, **changes: Any) -> Any:
    """Every weight in a dictionary."""
    from accelerate import cpu_offload

    return cpu_offload(tiny(arch, **changes), execution_device=torch.device("cpu"))


def on_disk(arch: str, folder: Path, **changes: Any) -> Any:
    """Every weight in a file of its own."""
    from accelerate import disk_offload

    model = tiny(arch, **changes)
    disk_offload(model, str(folder / "weights"), execution_device=torch.device("cpu"))
    return model


def in_checkpoint(arch: str, folder: Path, **changes: Any) -> Any:
    """The last layer stays in the safetensors file of a checkpoint, the rest is resident."""
    from transformers import AutoModelForCausalLM

    model = tiny(arch, **changes)
    model.save_pretrained(folder / "checkpoint")
    return AutoModelForCausalLM.from_pretrained(folder / "checkpoint", device_map=last_layer_on_disk(model)).eval()


def last_layer_on_disk(model: Any) -> dict[str, str]:
    """A ``device_map`` with every leaf on the CPU but those of the last layer."""
    layers = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1].isdigit()]
    leaves = [n for n, m in model.named_modules() if n and not list(m.children()) and not n.startswith(layers[-1])]
    return {**dict.fromkeys(leaves, "cpu"), layers[-1]: "disk"}


KINDS: dict[str, Make] = {"memory": in_memory, "disk": on_disk, "checkpoint": in_checkpoint}
