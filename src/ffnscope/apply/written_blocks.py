"""Shards of finished blocks that wait in a folder, so that a checkpoint whose writing was interrupted goes on."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ffnscope.io import disposable, hash_file, read_state, write_state

STATE = "blocks.json"
SUFFIX = ".written"


class WrittenBlocks:
    """Finished shards in a folder, each with its hash; a state file names them and is replaced after each block.

    Args:
        folder: made when the first block is added.
        key: hash of what all blocks depend on; what was written with another key is ignored and overwritten.

    Raises:
        ArtifactError: the state file is damaged.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key
        self._blocks: dict[str, dict[str, Any]] = {}
        if self._state.exists():
            with disposable("all blocks are written again"):
                found = read_state(self._state)
                self._blocks = found["blocks"] if found.get("key") == key else {}

    def find(self, block: str, key: str) -> list[Path] | None:
        """The files of a block that is finished and intact, and depends on the same; None = write it.

        Warns:
            UserWarning: a file is missing or not what was written.
        """
        known = self._blocks.get(block)
        if known is None or known["key"] != key:
            return None
        for name, wanted in known["files"].items():
            path = self.folder / name
            if not path.exists() or hash_file(path) != wanted:
                warnings.warn(f"{path} is not what was written there; {block} is written again.", stacklevel=2)
                return None
        return [self.folder / name for name in known["files"]]

    def add(self, block: str, key: str, files: Sequence[Path]) -> None:
        """Remember the files of a finished block."""
        self._blocks[block] = {"key": key, "files": {path.name: hash_file(path) for path in files}}
        write_state(self._state, {"key": self.key, "blocks": self._blocks})

    def remove(self) -> None:
        """Remove all shards and the state, and the folder when it is empty."""
        remove_written(self.folder)

    @property
    def _state(self) -> Path:
        return self.folder / STATE


def remove_written(folder: Path) -> None:
    """Remove what `WrittenBlocks` keeps in a folder, and the folder when nothing else is in it."""
    (folder / STATE).unlink(missing_ok=True)
    for path in folder.glob(f"*{SUFFIX}"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is in it, or it is not there
        folder.rmdir()


def put(path: Path, place: Path) -> None:
    """Let a file also be at ``place``: on the same disk without a copy."""
    try:
        os.link(path, place)
    except OSError:
        shutil.copyfile(path, place)
