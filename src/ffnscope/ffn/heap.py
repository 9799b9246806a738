"""Memory that is free, but that the allocator has not given back."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any


def give_back_free() -> None:
    """Give pages that hold nothing back to the system, where the C library is glibc; elsewhere do nothing.

    glibc keeps what was freed below 32 MB for itself, and its aligned allocations, which torch makes, do not fit into
    the gaps (bug 14581): a process that reads and frees one block after the other grows by about a block with each.
    Takes about 2 ms; nothing later changes.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], Any] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc; Windows has no library without a name
        return None
