"""What a curve sets beside the rule of a card: rows of `BASELINES`, and dense FFNs of fewer bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ffnscope.errors import UsageError, unknown_name
from ffnscope.sparse.baselines import BASELINES, at_density, baseline, fit_predictors
from ffnscope.sparse.forms import Form, MaskedForm, low_bit_form, low_rank_form
from ffnscope.sparse.rule import SelectionRule
from ffnscope.sparse.traces import Traces
from ffnscope.types import FFNSite

LOW_BIT = {f"{bits}-bit dense FFN": bits for bits in range(2, 9)}
LOW_RANK = "whitened low-rank FFN"
RIVALS = (*BASELINES, *LOW_BIT, LOW_RANK)
"""Labels of all: see `BASELINES`, `low_bit_form` and `low_rank_form`, whose share of the bytes is the density."""
USUAL = ("oracle top-k", "static mean", "4-bit dense FFN")
"""The best order there is, one selection for all tokens, and the dense FFNs at about a quarter of their bytes."""


def check_rivals(
    labels: Sequence[str], densities: Sequence[float] = (), sites: Sequence[FFNSite] = (), prompt: int = 0
) -> None:
    """Refuse what cannot be measured, before any work.

    Raises:
        UsageError: a label that is unknown or given twice, a row for gated FFNs where one has no gate, one that needs a
            prompt where windows have none, or a density that a row cannot go down to.
    """
    for label in labels:
        if label not in RIVALS:
            raise unknown_name("row to compare with", label, RIVALS)
        row = BASELINES.get(label)
        if row is not None and row.needs_prompt and not prompt:
            raise UsageError(
                f"{label} selects by the prompt of a window, and this rule has none; it can stand beside a rule that "
                "takes one, such as griffin, only. Leave it out."
            )
        without = next((site for site in sites if site.gate is None), None)
        if row is not None and row.gated and without is not None:
            raise UsageError(f"{label} reads the gate, and {without.name} has none. Leave it out.")
        _check_lowest(label, min(densities, default=1.0), sites)
    if len(set(labels)) < len(labels):
        raise UsageError(f"the rows to compare with are {', '.join(labels)}; give each once.")


def _check_lowest(label: str, density: float, sites: Sequence[FFNSite]) -> None:
    row = BASELINES.get(label)
    lowest = SelectionRule(policy=row.policy).core_share if row is not None and row.policy == "hybrid" else 0.0
    if label == LOW_RANK:  # a factor of rank 1
        lowest = max(((site.d_model + site.d_ff) / (site.d_model * site.d_ff) for site in sites), default=0.0)
    if density <= lowest:
        raise UsageError(
            f"{label} cannot go down to a density of {density:g}, only to one above {lowest:.3g}. Give higher "
            "densities, or leave it out."
        )


def points_of(label: str, densities: Sequence[float]) -> list[str]:
    """Names of the points of a row, unlike those of any other: one per density, or a single one of its own cost."""
    row = BASELINES.get(label)
    if label in LOW_BIT or (row is not None and row.parameter is not None):
        return [label]
    return [f"{label} {density:g}" for density in densities]


def rival_forms(
    model: nn.Module, traces: Traces, sites: Sequence[FFNSite], label: str, densities: Sequence[float]
) -> Iterator[Form]:
    """Yield the form of each of the points of a row.

    Args:
        model: the traced model.
        traces: whose fit documents make predictors, and whose calibration documents the parameters.
        sites: FFNs that are sparse.
        label: of `RIVALS`.
        densities: of the curve.
    """
    if label in LOW_BIT:
        yield low_bit_form(model, LOW_BIT[label], sites=sites)
        return
    if label == LOW_RANK:
        for share in densities:
            yield low_rank_form(model, traces, share, sites=sites)
        return
    row = baseline(label)
    made = fit_predictors(model, traces, row, sites=sites)
    for density, _ in zip(densities, points_of(label, densities), strict=False):
        yield MaskedForm(label, at_density(traces, made, row, density))
