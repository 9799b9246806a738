"""Where the damage of a pruned model is: errors of FFN outputs, as the facts of a reconstruction tell them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ffnscope.types import PruningPlan

NAMES = {
    "least squares, one shot": "one-shot refit",
    "sequential": "sequential refit",
    "means of removed channels as a bias": "mean bias",
}
"""Method of the facts -> name in tables."""
ERRORS = ("error_without", "error")
RAISED = "damping_raised_to"
"""Fact of an FFN whose least squares could only be factorised with more damping."""


def reconstruction_name(facts: Mapping[str, Any]) -> str:
    """The kind of reconstruction in a few words; of a trained one they say so."""
    name = NAMES.get(str(facts.get("method")), "reconstruction")
    return f"{name}, distilled (trained)" if facts.get("trained") else name


def error_profile(plan: PruningPlan, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per FFN: its channels before and after, and the squared error of its output.

    ``error_without`` and ``error`` are shares of the output's power, without and with the refit; ``held_out`` says
    whether they were taken on calibration tokens that were held out to choose the damping, and ``error`` then with
    columns that were fitted to the others. The columns of the result are fitted to all tokens afterwards. FFNs of which
    no error is known are left out.

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


def judged_on(rows: Sequence[Mapping[str, Any]]) -> str:
    """On which tokens the errors of an `error_profile` were taken, and with which columns; in words."""
    held_out = [row["held_out"] for row in rows]
    if not any(held_out):
        return "the calibration tokens that the columns are fitted to"
    some = "" if all(held_out) else f" (of {len(held_out) - sum(held_out)} FFNs, which had none, those of the fit)"
    return (
        f"calibration tokens{some} that were held out to choose the damping, with columns fitted to the others; the "
        "saved columns are fitted to all of them afterwards"
    )


def raised_dampings(facts: Mapping[str, Any]) -> str | None:
    """The FFNs that needed more damping than was chosen to be factorised, in words; None where there is none."""
    sites: Mapping[str, Any] = facts.get("sites", {})
    raised = {name: one for name, one in sites.items() if RAISED in one}
    if not raised:
        return None
    most = max(raised, key=lambda name: raised[name][RAISED])
    chosen, used = raised[most]["damping"], raised[most][RAISED]
    return f"{len(raised)} of {len(sites)} FFNs, the most from {chosen:g} to {used:g} ({most})"
