"""Folders for what one process keeps on disk for the time being; what killed processes left is deleted."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from pathlib import Path


class OwnFolder:
    """A new folder that other processes see is in use, as long as this one lives.

    It is locked, and the kernel gives a lock back however a process ends. So making one deletes those of the same name
    whose process is gone. Where folders cannot be locked (Windows, some file systems) nothing is deleted. The name is
    one that `ffnscope.apply.folder.sweep` knows.

    Args:
        parent: where; made if it is not there. None = the system's folder for temporary files.
        name: what it is for.
    """

    def __init__(self, parent: Path | None, name: str):
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f".{name}.*.tmp"):
            _delete_left(left)
        made = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=parent))
        self._lock = _locked(made)  # before it has a name that others look for
        self.path = made.rename(parent / f".{name}.{uuid.uuid4().hex}.tmp")

    def remove(self) -> None:
        """Delete it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _delete_left(folder: Path) -> None:
    lock = _locked(folder)
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked(folder: Path) -> int | None:
    """A handle that locks a folder; None where another process does, or where that is not possible."""
    try:
        import fcntl
    except ImportError:
        return None
    handle = None
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    if handle is not None:
        os.close(handle)
    return None
