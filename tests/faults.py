"""Faults made on purpose."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def small_files(limit: int = 512) -> Iterator[None]:
    """Within the block, no file can grow beyond ``limit`` bytes: a write fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def flip_digit(path: Path, after: str) -> None:
    """Change a bit of the first whole number behind ``after`` in a text file, in its last digit."""
    text = path.read_text()
    found = re.compile(r"\d+").search(text, text.index(after) + len(after))
    assert found is not None
    place = found.end() - 1
    path.write_text(text[:place] + str(int(text[place]) ^ 1) + text[place + 1 :])


def stop_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> list[int]:
    """Raise KeyboardInterrupt at one call of a function; returns a list that grows by every call."""
    real, calls = getattr(module, name), []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapper)
    return calls
