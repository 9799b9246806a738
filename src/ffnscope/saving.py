"""Files that are written whole or not at all, and what is said where that fails."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from ffnscope.errors import ArtifactError

if TYPE_CHECKING:
    from safetensors import SafetensorError

_TORCH_SIGNS = ("inline_container", "PytorchStreamWriter", "iostream")
_SAFETENSORS_SIGN = "Error while serializing"


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yield a temporary path beside ``path``; rename it when the block succeeds, remove it when it fails.

    Raises:
        ArtifactError: the folder or the file cannot be written (no permission, full disk).
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Generator[None]:
    """Turn every failure of writing ``path`` into an ArtifactError that names it, also those of torch.save.

    What is written may be read meanwhile, from shards of a large model: a failure of that is told as such. torch writes
    its zip files by itself, and of the RuntimeError that it raises does not tell the reason, which mostly is a full
    disk.
    """
    from safetensors import SafetensorError

    try:
        yield
    except ArtifactError:
        raise
    except (OSError, SafetensorError) as error:
        if _is_of_reading(error):
            raise ArtifactError(
                f"while {path} was made, a safetensors file could not be read: {error}. Put an intact copy there, and "
                "call again."
            ) from error
        what = getattr(error, "strerror", None) or str(error)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in what
        todo = " Make room, and call again." if full else ""
        raise ArtifactError(f"cannot write {path}: {what}.{todo}") from error
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _TORCH_SIGNS):
            raise
        free = shutil.disk_usage(_nearest(path)).free / 2**20
        raise ArtifactError(
            f"cannot write {path}: torch.save failed ({error}), with {free:,.1f} MiB free. Make room, and call again."
        ) from error


def _is_of_reading(error: OSError | SafetensorError) -> bool:
    """Whether safetensors raised it on reading: without a number of the system's, or not as it does on writing."""
    if isinstance(error, OSError):
        return error.errno is None and type(error) is FileNotFoundError
    return _SAFETENSORS_SIGN not in str(error)


def check_writable(folder: Path) -> None:
    """Raise ArtifactError unless a file can be made in a folder, or in the one above that is there; none stays."""
    with writing(folder), tempfile.TemporaryFile(dir=_nearest(folder)):
        pass


def _nearest(path: Path) -> Path:
    """The path itself, or the first above it that is there."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())
