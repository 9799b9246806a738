"""What torch.save says when a disk is full."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Generator
from pathlib import Path

from ffnscope.errors import ArtifactError

_SIGNS = ("inline_container", "PytorchStreamWriter", "iostream")


@contextlib.contextmanager
def torch_saving(path: Path) -> Generator[None]:
    """Turn the RuntimeError of a torch.save below ``path`` that could not write into an ArtifactError that names it.

    torch writes its zip files by itself and does not tell the reason, which mostly is a full disk.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _SIGNS):
            raise
        nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(nearest).free / 2**20
        raise ArtifactError(
            f"cannot write {path}: torch.save failed ({error}), with {free:,.1f} MiB free. Make room, and call again."
        ) from error
