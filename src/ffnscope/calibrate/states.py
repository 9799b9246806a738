"""Hidden states that wait between blocks: on the device that made them, in main memory, or on disk."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ffnscope.ffn.streamed import Place

Key = tuple[int, int]
"""What a tensor is: the block that it waits for (or -1 for a gradient), and its batch."""


class HiddenStates:
    """Tensors by block and batch; a context that removes what is on disk at its end.

    Args:
        place: where tensors wait; they come back on the device that they were on.
        folder: in which a folder of its own is made for those on disk; None = that of the system.
    """

    def __init__(self, place: Place, folder: Path | None = None):
        self.place = place
        self._parent = folder
        self._folder: Path | None = None
        self._held: dict[Key, Tensor] = {}
        self._devices: dict[Key, torch.device] = {}

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def put(self, key: Key, value: Tensor) -> None:
        """Keep a tensor, without its graph."""
        value = value.detach()
        self._devices[key] = value.device
        if self.place == "disk":
            torch.save(value.cpu().clone(), self._file(key))  # a clone, since a view would be saved with all behind it
        else:
            self._held[key] = value.cpu() if self.place == "cpu" else value

    def get(self, key: Key) -> Tensor:
        """The tensor; it stays."""
        if self.place == "disk":
            return torch.load(self._file(key), weights_only=True).to(self._devices[key])
        return self._held[key].to(self._devices[key])

    def pop(self, key: Key) -> Tensor:
        """The tensor; it is not kept any longer."""
        value = self.get(key)
        self.drop(key)
        return value

    def drop(self, key: Key) -> None:
        """Keep a tensor no longer."""
        self._devices.pop(key)
        if self.place == "disk":
            self._file(key).unlink()
        else:
            del self._held[key]

    def _file(self, key: Key) -> Path:
        if self._folder is None:
            if self._parent is not None:
                self._parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="ffnscope-states-", dir=self._parent))
        return self._folder / f"{key[0]}_{key[1]}.pt"
