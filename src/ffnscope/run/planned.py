"""Keys of the guide that a later version brings: the only place that lists them. A key leaves by deleting its row."""

from __future__ import annotations

from collections.abc import Mapping

PLANNED_KEYS: Mapping[str, object] = {"pruning.structured": True}
"""Dotted path -> the only value that this version supports (the default)."""


def not_available(what: str) -> str:
    """Text of the problem for a planned key."""
    return f"{what} is not available in this version"
