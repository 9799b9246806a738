"""A capture on disk: a folder that appears when it is complete, and is read site by site."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffnscope.errors import ArtifactError, UsageError, unknown_name
from ffnscope.io import SCHEMA, expect_kind, read_json, read_state, read_tensors
from ffnscope.types import FFNSite
from ffnscope.unchanged import while_unchanged

INDEX = "index.json"
KIND = "capture"


@dataclass(frozen=True, slots=True, eq=False)
class Capture:
    """Token-level arrays of some channels. Rows are the valid tokens, window by window, in the order of the text.

    Those of an expert are only the tokens that are routed to it, in the order in which it is given them: `tokens`.

    Attributes:
        path: the folder.
        channels: site -> indices of the captured channels, int64 [n_channels], the columns of ``h`` and ``g``.
        n_tokens: number of rows, but for experts.
        gradients: whether ``g`` was captured.
        parts: shard files, in the order of the rows.
        facts: the index as it was written (hash and source of the windows, bytes, ...).
    """

    path: Path
    channels: Mapping[FFNSite, Tensor]
    n_tokens: int
    gradients: bool
    parts: tuple[Path, ...]
    facts: Mapping[str, Any]

    @property
    def sites(self) -> tuple[FFNSite, ...]:
        """Captured sites."""
        return tuple(self.channels)

    def h(self, site: FFNSite) -> Tensor:
        """Activations of one site, [n_tokens, n_channels], in the dtype of the model; of an expert, [n, n_channels]."""
        return self._joined(f"{self._known(site).name}/h")

    def g(self, site: FFNSite) -> Tensor:
        """Gradients of the summed token NLL with respect to h of one site, in the shape of ``h``.

        Raises:
            UsageError: gradients were not captured.
        """
        if not self.gradients:
            raise UsageError(f"{self.path} holds no gradients; capture again with gradients=True.")
        return self._joined(f"{self._known(site).name}/g")

    def tokens(self, site: FFNSite) -> Tensor:
        """Which tokens the rows of a site are: int64 [n], indices into `token_ids`, `window` and `position`."""
        if self._known(site).expert is None:
            return torch.arange(self.n_tokens)
        return self._joined(f"{site.name}/tokens")

    @property
    def token_ids(self) -> Tensor:
        """Token of each row, [n_tokens] int64."""
        return self._joined("token_ids")

    @property
    def window(self) -> Tensor:
        """Index of the window of each row, [n_tokens] int64."""
        return self._joined("window")

    @property
    def position(self) -> Tensor:
        """Index of each row's token within its window, [n_tokens] int64."""
        return self._joined("position")

    def _known(self, site: FFNSite) -> FFNSite:
        if site not in self.channels:
            raise unknown_name("captured site", site.name, [s.name for s in self.sites])
        return site

    def _joined(self, key: str) -> Tensor:
        return torch.cat([_read_one(part, key) for part in self.parts])


def read_capture(path: Path) -> Capture:
    """Open what `capture` wrote. Arrays are read when they are asked for, one site at a time.

    Raises:
        ArtifactError: there is no finished capture at ``path``, or it is of a newer schema.
    """
    facts = read_state(path / INDEX)
    expect_kind(path / INDEX, facts, KIND)
    if facts["schema"] > SCHEMA:
        raise ArtifactError(f"{path} has schema {facts['schema']}; this version reads up to {SCHEMA}: update ffnscope.")
    channels = {
        FFNSite(**row["site"]): torch.arange(row["site"]["d_ff"])
        if row["channels"] is None
        else torch.tensor(row["channels"], dtype=torch.int64)
        for row in facts["sites"]
    }
    parts = tuple(path / name for name in facts["parts"])
    missing = [p.name for p in parts if not p.exists()]
    if missing:
        raise ArtifactError(f"{path} is incomplete: {missing[0]} is missing. Capture again.")
    return Capture(path, channels, facts["n_tokens"], facts["gradients"], parts, facts)


@contextlib.contextmanager
def new_folder(out: Path, *, overwrite: bool) -> Generator[Path]:
    """Yield a temporary folder beside ``out``; it takes the name when the block succeeds, and is removed when it fails.

    Raises:
        ArtifactError: ``out`` exists, and may not be overwritten or is not a capture; or the place is not writable.
    """
    if out.exists() and not overwrite:
        raise ArtifactError(f"{out} exists. Choose another folder, or replace it with overwrite=True.")
    if out.exists() and not _is_capture(out):
        raise ArtifactError(f"{out} is not a capture, so it is not overwritten. Choose another folder.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise ArtifactError(f"cannot write {out}: {error.strerror or error}.") from error
    part, old = place / "new", place / "old"
    try:
        part.mkdir()
        yield part
        if out.exists():
            out.rename(old)
        part.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(place)


def _is_capture(path: Path) -> bool:
    if not (path / INDEX).exists():
        return False
    found = read_json(path / INDEX)
    return isinstance(found, dict) and found.get("kind") == KIND


def _read_one(path: Path, key: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            value = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); capture again.") from error
    _check(path)
    return value


@while_unchanged
def _check(path: Path) -> None:
    """Compare the checksum of a part, which reads it as a whole.

    Raises:
        ArtifactError: it is damaged.
    """
    read_tensors(path)
