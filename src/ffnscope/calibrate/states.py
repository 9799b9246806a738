"""Hidden states that wait between blocks: on the device that made them, in main memory, or on disk."""

from __future__ import annotations

from collections.abc import MutableSequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffnscope.calibrate.sweep_files import SweepFiles
from ffnscope.ffn.own_folder import OwnFolder
from ffnscope.ffn.streamed import Place
from ffnscope.io import read_tensors, write_tensors

Key = tuple[int, int]
"""What a tensor is: the block that it waits for (below 0: a gradient) or the sequence that it is in, and its batch."""


class StateSequence(MutableSequence[Tensor]):
    """Tensors in order, kept by `HiddenStates`; it grows at its end only."""

    def __init__(self, states: HiddenStates, row: int):
        self._states, self._row, self._length = states, row, 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        return self._states.get((self._row, range(self._length)[index]))

    def __setitem__(self, index: Any, value: Any) -> None:
        self._states.put((self._row, range(self._length)[index]), value)

    def __delitem__(self, index: Any) -> None:
        raise TypeError("what waits in order is not taken out")

    def insert(self, index: int, value: Tensor) -> None:
        """Add a tensor at the end."""
        assert index == self._length, "it grows at its end only"
        self._length += 1
        self[index] = value


class HiddenStates:
    """Tensors by block and batch; a context that removes what is on disk at its end.

    Args:
        place: where tensors wait; they come back on the device that they were on.
        folder: in which a folder of its own is made for those on disk; None = that of the system.
        kept: files of a pass that can go on after an interrupt. What is on disk is there instead, and stays until the
            stage in which it was dropped has been saved.
    """

    def __init__(self, place: Place, folder: Path | None = None, kept: SweepFiles | None = None):
        self.place = place
        self._kept = kept
        self._parent = folder
        self._folder: OwnFolder | None = None
        self._held: dict[Key, Tensor] = {}
        self._devices: dict[Key, torch.device] = {}
        self._sequences = 0

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.clear()
        if self._folder is not None:
            self._folder.remove()

    def put(self, key: Key, value: Tensor) -> None:
        """Keep a tensor, without its graph."""
        value = value.detach()
        self._devices[key] = value.device
        if self.place == "disk" and self._kept is not None:
            self._kept.write_state(key, value)
        elif self.place == "disk":
            write_tensors(self._file(key), {"state": value.cpu()}, {"kind": "hidden state"})
        else:
            self._held[key] = value.cpu() if self.place == "cpu" else value

    def get(self, key: Key) -> Tensor:
        """The tensor; it stays."""
        if self.place == "disk" and self._kept is not None:
            return self._kept.read_state(key).to(self._devices[key])
        if self.place == "disk":
            return read_tensors(self._file(key))[0]["state"].to(self._devices[key])
        return self._held[key].to(self._devices[key])

    def pop(self, key: Key) -> Tensor:
        """The tensor; it is not kept any longer."""
        value = self.get(key)
        self.drop(key)
        return value

    def drop(self, key: Key) -> None:
        """Keep a tensor no longer."""
        self._devices.pop(key)
        if self.place != "disk":
            del self._held[key]
        elif self._kept is None:
            self._file(key).unlink()

    def take_over(self, key: Key, device: torch.device) -> None:
        """Go on with what an interrupted pass has kept."""
        assert self._kept is not None, "only a pass that keeps files goes on"
        self._devices[key] = device
        if self.place != "disk":
            value = self._kept.read_state(key)
            self._held[key] = value if self.place == "cpu" else value.to(device)

    def keep(self) -> list[Key]:
        """Write what waits to the files of the pass, where it is not there; return what waits."""
        assert self._kept is not None, "only a pass that keeps files goes on"
        for key, value in self._held.items():
            if not self._kept.has_state(key):
                self._kept.write_state(key, value)
        return list(self._devices)

    def sequence(self) -> StateSequence:
        """A new sequence of tensors that wait here too."""
        self._sequences += 1
        return StateSequence(self, self._sequences)

    def _file(self, key: Key) -> Path:
        if self._folder is None:
            self._folder = OwnFolder(self._parent, "ffnscope-states")
        return self._folder.path / f"{key[0]}_{key[1]}.safetensors"
