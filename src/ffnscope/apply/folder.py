"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Generator
from pathlib import Path

from ffnscope.errors import ArtifactError
from ffnscope.io import writing


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise ArtifactError when an output exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise ArtifactError(f"{path} already exists. Choose another output, or pass --overwrite to replace it.")


@contextlib.contextmanager
def replacing_folder(path: Path, overwrite: bool) -> Generator[Path]:
    """Yield a temporary folder beside ``path``; rename it when the block succeeds, remove it when it fails.

    Raises:
        ArtifactError: ``path`` exists and ``overwrite`` is not set, or it cannot be written.
    """
    refuse_existing(path, overwrite)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with writing(path):
            part.mkdir(parents=True)
            yield part
            _swap(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _swap(part: Path, path: Path) -> None:
    """Rename ``part`` to ``path``; what was there is moved aside first, put back on failure, and removed last."""
    if not path.exists():
        part.replace(path)
        return
    old = part.with_suffix(".old")
    path.replace(old)
    try:
        part.replace(path)
    except BaseException:
        old.replace(path)
        raise
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink()
