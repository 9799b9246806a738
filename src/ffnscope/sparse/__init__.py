"""Contextual sparsity: which channels a token needs, and FFNs that read only those."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffnscope.sparse.card_files import read_card
    from ffnscope.sparse.fit import fit_card
    from ffnscope.sparse.runtime import unwrap_, wrap_
    from ffnscope.sparse.tracing import trace

__all__ = ["fit_card", "read_card", "trace", "unwrap_", "wrap_"]
_HOMES = {"fit_card": "fit", "read_card": "card_files", "trace": "tracing", "unwrap_": "runtime", "wrap_": "runtime"}


def __getattr__(name: str) -> Any:
    """The functions that users need, imported when they are asked for: modules here import each other."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
