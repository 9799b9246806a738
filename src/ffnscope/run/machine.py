"""How much memory an accelerator has, and what libraries take."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from ffnscope.run.progress import peak_memory

_MODEL_CODE = "transformers.models.llama.modeling_llama"  # imports nearly all that the code of any model does


def library_bytes(root: Path = Path("/")) -> int:
    """Bytes of main memory of this process now, with the libraries that run a model: to be called before one is loaded.

    Not the peak so far, in which models count that are gone again, except where the system tells only that.
    """
    importlib.import_module(_MODEL_CODE)
    try:
        rows = dict(line.split(":", 1) for line in (root / "proc/self/status").read_text().splitlines() if ":" in line)
    except OSError:
        return peak_memory()["resident"]
    return int(rows["VmRSS"].split()[0]) * 1024


def device_memory(device: torch.device) -> int | None:
    """Bytes of a CUDA device; None for others."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
