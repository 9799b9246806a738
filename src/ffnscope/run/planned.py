"""Names and keys of the guide that a later version brings: the only place that lists them.

A metric leaves the list by being registered (its row here is then dead and can go); a key by deleting its row.
"""

from __future__ import annotations

from collections.abc import Mapping

from ffnscope.registry import METRICS

PLANNED_METRICS: tuple[str, ...] = (
    "rayleigh_quotient",
    "delta_alignment",
    "mutual_information_gaussian",
    "average_redundancy",
    "pairwise_redundancy_gaussian",
    "sparsegpt",
    "flap",
    "llm_pruner",
    "supernode_protection_score",
    "supernode_connectivity_score",
    "composite",
)

PLANNED_KEYS: Mapping[str, object] = {
    "pruning.structured": True,
}
"""Dotted path -> the only value that this version supports (the default)."""


def planned_metrics() -> tuple[str, ...]:
    """Metric names of the guide that nothing has registered yet."""
    known = set(METRICS.names())
    return tuple(name for name in PLANNED_METRICS if name not in known)


def not_available(what: str) -> str:
    """Text of the problem for a planned name or key."""
    return f"{what} is not available in this version"
