"""Where the damage of a pruned model is: errors of FFN outputs, as the facts of a reconstruction tell them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ffnscope.types import PruningPlan

NAMES = {
    "least squares, one shot": "one-shot refit",
    "sequential": "sequential refit",
    "means of removed channels as a bias": "mean bias",
}
"""Method of the facts -> name in tables."""
ERRORS = ("error_without", "error")


def reconstruction_name(facts: Mapping[str, Any]) -> str:
    """The kind of reconstruction in a few words; of a trained one they say so."""
    name = NAMES.get(str(facts.get("method")), "reconstruction")
    return f"{name}, distilled (trained)" if facts.get("trained") else name


def error_profile(plan: PruningPlan, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per FFN: its channels before and after, and the squared error of its output.

    ``error_without`` and ``error`` are shares of the output's power, without and with the refit; ``held_out`` says
    whether they were taken on tokens that the refit did not see. FFNs of which no error is known are left out.

    Args:
        plan: what stays.
        facts: of the `Reconstruction`.
    """
    rows: list[dict[str, Any]] = []
    for site, kept in plan.kept.items():
        one = facts.get("sites", {}).get(site.name, {})
        if any(name not in one for name in ERRORS):
            continue
        row: dict[str, Any] = {"site": site.name, "d_ff": site.d_ff, "width": kept.numel()}
        rows.append({**row, **{name: one[name] for name in (*ERRORS, "held_out")}})
    return rows
