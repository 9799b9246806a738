"""The columns of finished blocks on disk, a file per block, so that an interrupted reconstruction goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ffnscope.apply.block_fit import Columns
from ffnscope.apply.rows import ChannelRows
from ffnscope.errors import ArtifactError
from ffnscope.io import disposable, expect_kind, read_tensors, write_tensors
from ffnscope.types import FFNSite

KIND = "reconstructed block"


class BlockFiles:
    """Files of finished blocks in a folder, or nothing without one.

    Args:
        folder: where they are; removed when all is done, unless something else is in it.
        key: hash of everything that the columns depend on. A file with another key is ignored and overwritten.
    """

    def __init__(self, folder: Path | None, key: str = ""):
        self.folder = folder
        self.key = key

    def read(self, block: int, sites: Sequence[FFNSite]) -> dict[FFNSite, Columns] | None:
        """Columns of a finished block, or None.

        Raises:
            ArtifactError: the file is damaged, or of another kind.
        """
        if self.folder is None or not self._file(self.folder, block).exists():
            return None
        path = self._file(self.folder, block)
        with disposable("the block is reconstructed again"):
            tensors, facts = read_tensors(path)
            expect_kind(path, facts, KIND)
            if facts.get("key") != self.key:
                return None
            try:
                return {s: _columns(tensors, s, facts["sites"][s.name]) for s in sites}
            except KeyError as error:
                raise ArtifactError(f"{path} is not complete: {error} is missing.") from error

    def write(self, block: int, found: dict[FFNSite, Columns]) -> dict[FFNSite, Columns]:
        """Keep the columns of a finished block; return them as they are mapped from the file, which takes no memory."""
        if self.folder is None:
            return found
        tensors: dict[str, Tensor] = {}
        for site, one in found.items():
            parts = {"kept": one.kept, "down": one.down, **({} if one.rows is None else one.rows.tensors)}
            parts |= {} if one.bias is None else {"bias": one.bias}
            tensors |= {f"{name}/{site.name}": value for name, value in parts.items()}
        rows = {s.name: dict(one.facts) for s, one in found.items()}
        write_tensors(self._file(self.folder, block), tensors, {"kind": KIND, "key": self.key, "sites": rows})
        return self.read(block, list(found)) or found

    def remove(self) -> None:
        """Remove the files of all blocks, and the folder when it is empty."""
        if self.folder is None:
            return
        for path in self.folder.glob("block_*.safetensors"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is in it
            self.folder.rmdir()

    @staticmethod
    def _file(folder: Path, block: int) -> Path:
        return folder / f"block_{block:04d}.safetensors"


def _columns(tensors: Mapping[str, Tensor], site: FFNSite, facts: Mapping[str, Any]) -> Columns:
    kept, down, bias = tensors[f"kept/{site.name}"], tensors[f"down/{site.name}"], tensors.get(f"bias/{site.name}")
    return Columns(kept, down, facts, ChannelRows.of(tensors, site), bias)
