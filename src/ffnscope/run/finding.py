"""What a rule between blocks of a configuration found."""

from __future__ import annotations

from dataclasses import dataclass

from ffnscope.run.document import KeyPath, Problem


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem, and the keys that it was derived from: it is void when one of these is itself wrong."""

    problem: Problem
    reads: tuple[KeyPath, ...]


def finding(path: KeyPath, message: str, *reads: KeyPath) -> Finding:
    """A problem at a key, derived from it and from others."""
    return Finding(Problem(path, message), (path, *reads))
