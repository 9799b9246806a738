"""Outputs that appear whole or not at all, and folders in which one process is at work."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import os
import shutil
import uuid
from collections.abc import Generator
from pathlib import Path

from ffnscope.errors import ArtifactError
from ffnscope.saving import writing

_ID = "[0-9a-f]" * 32
"""Of the names that `staged` and `ffnscope.saving.replacing` give."""


def refuse_existing(path: Path, overwrite: bool, option: str = "output") -> None:
    """Raise ArtifactError when an output exists and may not be replaced; names what a broken-off call left beside it.

    That stays: it may be of a call with --overwrite that is to go on, or still runs. ``option`` is what names ``path``.
    """
    if not path.exists() or overwrite:
        return
    left = [found.name for found in _working_folders(path) if any(found.iterdir())]
    told = f" Beside it lies {', '.join(left)}, of a call that did not end; delete it unless that is to go on."
    raise ArtifactError(
        f"{path} already exists. Choose another {option}, or pass --overwrite to replace it.{told if left else ''}"
    )


def _working_folders(path: Path) -> list[Path]:
    """Hidden folders ``.NAME.COMMAND.part`` beside an output, in which commands keep what they have found so far."""
    if not path.name:
        return []
    found = path.parent.glob(f".{glob.escape(path.name)}.*.part")
    return sorted(one for one in found if one.is_dir() and one.name.count(".") == path.name.count(".") + 3)


@contextlib.contextmanager
def staged(path: Path, overwrite: bool) -> Generator[Path]:
    """Yield a path of the same name in a temporary folder beside ``path``; what the block makes there is then moved.

    When the block fails, nothing of it stays, and what was at ``path`` is as it was.

    Raises:
        ArtifactError: ``path`` exists and ``overwrite`` is not set, or it cannot be written.
    """
    refuse_existing(path, overwrite)
    holder = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    made = holder / path.name
    try:
        with writing(path):
            holder.mkdir(parents=True)
            yield made
            _swap(made, path, holder.with_suffix(".old"))
    except ArtifactError as error:
        raise ArtifactError(str(error).replace(str(made), str(path))) from error
    finally:
        shutil.rmtree(holder, ignore_errors=True)


@contextlib.contextmanager
def replacing_folder(path: Path, overwrite: bool) -> Generator[Path]:
    """As `staged`, for a folder, which is made."""
    with staged(path, overwrite) as made:
        made.mkdir()
        yield made


def sweep(folder: Path, name: str | None = None) -> None:
    """Delete what a process left that was killed while it wrote; an output that it had moved aside is put back.

    Only for a folder in which no other process is at work.

    Args:
        folder: where; with folders in it, unless a name is given.
        name: of the one output to look for.
    """
    pattern = f".{'*' if name is None else glob.escape(name)}.{_ID}"
    find = folder.rglob if name is None else folder.glob
    for old in list(find(f"{pattern}.old")):
        path = old.with_name(old.name[1:-37])
        _remove(old) if path.exists() else old.replace(path)
    for part in list(find(f"{pattern}.tmp")):
        _remove(part)


def is_unfinished(path: Path) -> bool:
    """Whether `sweep` deletes it: a file or folder of which a process was killed before it had its name."""
    return fnmatch.fnmatchcase(path.name, f".*.{_ID}.tmp")


@contextlib.contextmanager
def held(folder: Path) -> Generator[None]:
    """Lock a folder until the block or the process ends, however it ends; no file is made for it.

    Windows cannot lock a folder: there, nothing keeps two processes apart.

    Raises:
        ArtifactError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with writing(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())
        except BlockingIOError:
            free = False
        except OSError:
            free = True  # a file system without locks
        if not free:  # or the other process has just finished, and removed it
            raise ArtifactError(f"another process is at work in {folder}. Wait, or choose another output.")
        yield
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _swap(made: Path, path: Path, old: Path) -> None:
    """Rename ``made`` to ``path``; what was there is moved aside first, put back on failure, and removed last."""
    if not path.exists():
        made.replace(path)
        return
    path.replace(old)
    try:
        made.replace(path)
    except BaseException:
        old.replace(path)
        raise
    _remove(old)
