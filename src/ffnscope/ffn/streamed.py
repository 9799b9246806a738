"""Models that are streamed: their weights stay in the files, and one decoder block at a time is read for all windows.

Such a model is a skeleton on the meta device whose weights accelerate reads from the safetensors of the checkpoint when
a module runs (see `ffnscope.ffn.offload`), so whatever works on offloaded weights works on it. What is remembered here
is that passes over text should run block by block, and where hidden states wait between blocks.
"""

from __future__ import annotations

import atexit
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from ffnscope.ffn.own_folder import OwnFolder

Place = Literal["device", "cpu", "disk"]
PLACES: tuple[str, ...] = get_args(Place)


@dataclass(frozen=True, slots=True)
class _Streaming:
    """How a model is streamed: see `stream_`."""

    place: Place
    device: torch.device
    folder: Path | None


_STREAMED: weakref.WeakKeyDictionary[nn.Module, _Streaming] = weakref.WeakKeyDictionary()


def offload_to(folder: str | None) -> str:
    """Folder for weights that cannot be read from the checkpoint as they are, and for hidden states on disk.

    Without one, a temporary one that is removed when Python ends.
    """
    if folder is not None:
        return folder
    made = OwnFolder(None, "ffnscope-stream")
    atexit.register(made.remove)
    return str(made.path)


def stream_(model: nn.Module, place: Place, device: torch.device, folder: Path | None = None) -> nn.Module:
    """Let an offloaded model be run block by block from now on, on this device; return it.

    Args:
        model: all its weights offloaded by accelerate.
        place: where the hidden states of all windows wait between blocks.
        device: computes. Buffers are moved there; weights come when they are read.
        folder: for hidden states on disk; None = the system's folder for temporary files.
    """
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in [] if hook is None else getattr(hook, "hooks", (hook,)):
            if hasattr(one, "execution_device"):
                one.execution_device = device
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device.type != "meta":
                setattr(module, name, buffer.to(device))
    _STREAMED[model] = _Streaming(place, device, folder)
    return model


def wait_in(model: nn.Module, folder: Path) -> None:
    """Let hidden states on disk wait in this folder, if the model is streamed and was given none."""
    if model in _STREAMED and _STREAMED[model].folder is None:
        _STREAMED[model] = replace(_STREAMED[model], folder=folder)


def is_streamed(model: nn.Module) -> bool:
    """Whether passes over a model run block by block, each block being read once for all windows."""
    return model in _STREAMED


def waiting_place(model: nn.Module) -> tuple[Place, Path | None]:
    """Where the hidden states of a model wait between blocks, and the folder of those on disk."""
    found = _STREAMED.get(model)
    return ("device", None) if found is None else (found.place, found.folder)


def streaming_device(model: nn.Module) -> torch.device | None:
    """The device on which a streamed model computes; None for one that is not streamed."""
    found = _STREAMED.get(model)
    return None if found is None else found.device
