"""Faults of files: operations below a folder are counted, and one of them fails; file systems that are too small."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
PAGE = 4096


class Died(BaseException):
    """The process ends here."""


@dataclass
class Watch:
    """Counts the file operations that change something below a folder, and makes one of them fail.

    Attributes:
        root: the folder.
        at: number of the operation, from 1; None only counts.
        kind: "interrupt" (it raises), "death" (so does every later one, clean-up too), "full disk" (from then on
            nothing can be opened to write), "full disk in a write" (from then on no file grows beyond ``size`` bytes,
            so that a write fails in the middle: EFBIG in the place of ENOSPC), "kill" (SIGKILL).
        size: in bytes.
    """

    root: str
    at: int | None = None
    kind: str = "interrupt"
    size: int = 0
    count: int = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and bool(arguments[2] & WRITES)
        if not (opens or event in CHANGES) or not str(arguments[0]).startswith(self.root):
            return
        self.count += 1
        if self.at is None or self.count < self.at or (self.kind == "interrupt" and self.count > self.at):
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if not self.kind.startswith("full disk"):
            raise Died
        if self.kind == "full disk in a write":
            _limit_files(self.size)
        elif opens:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))


def _limit_files(size: int | None) -> None:
    """No file of this process may be longer; None = as long as before."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


_watching: list[Watch] = []
_hooked: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching:
        _watching[-1](event, arguments)


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Let a watch see all file operations of this process within the block."""
    if not _hooked:
        sys.addaudithook(_hook)  # cannot be taken away again
        _hooked.append(True)
    _watching.append(watch)
    try:
        yield watch
    finally:
        _watching.pop()
        _limit_files(None)


@contextmanager
def file_system(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """Within the block, a folder is a file system of ``size`` bytes; yields what makes it large.

    Raises:
        PermissionError: this process may not mount one.
    """
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
    )
    if made.returncode:
        raise PermissionError(made.stderr.strip())
    try:
        yield lambda: [subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True), None][1]
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a file system."""
    try:
        with file_system(folder, PAGE):
            return True
    except (PermissionError, FileNotFoundError):
        return False
