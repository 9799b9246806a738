"""What a file has once been found to be is remembered as long as the very same file stays as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")
Stamp = tuple[int, int, int, int]


def stamp(path: Path) -> Stamp | None:
    """Device, inode, size in bytes and time of the last change in ns of a file; None where there is none to look at."""
    try:
        entry = path.stat()
    except OSError:
        return None
    return entry.st_dev, entry.st_ino, entry.st_size, entry.st_mtime_ns


def while_unchanged(read: Callable[[Path], Found]) -> Callable[[Path], Found]:
    """Let a function of a file, such as a check, be called once in a process as long as the file keeps its `stamp`.

    What it raises is not remembered: a file that fails is read again. So is one that changes while it is read. Of each
    path only the last result is held; whoever receives it must not change it.
    """
    known: dict[Path, tuple[Stamp, Found]] = {}

    @functools.wraps(read)
    def remembered(path: Path) -> Found:
        key, now = path.absolute(), stamp(path)
        last = known.get(key)
        if last is not None and last[0] == now:
            return last[1]
        found = read(path)
        if now is not None:
            known[key] = now, found
        return found

    return remembered
