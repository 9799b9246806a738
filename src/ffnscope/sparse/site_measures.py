"""Measures of selections FFN by FFN on traced tokens: recall to oracle gap, with intervals by document."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.evaluate.intervals import Estimate, over_documents
from ffnscope.sparse.ffn import ffn_of
from ffnscope.sparse.gap import GAPS, oracle_gaps
from ffnscope.sparse.measures import MEASURES, Label, Select, Summary, of_mask, summarise, truths
from ffnscope.sparse.split import Part
from ffnscope.sparse.traces import Traces
from ffnscope.types import FFNSite

SITE_MEASURES = (*MEASURES, *GAPS)
"""Names of what is measured for every token of an FFN."""


@dataclass(frozen=True, slots=True)
class OverTokens:
    """A measure over the tokens of some documents.

    Attributes:
        summary: mean, p5 and p95 over tokens.
        estimate: the mean with its interval over documents.
    """

    summary: Summary
    estimate: Estimate


@dataclass(frozen=True, slots=True, eq=False)
class SiteMeasures:
    """What a selection costs and loses in one FFN.

    Attributes:
        site: the FFN.
        n_tokens: how many were measured.
        values: name of `SITE_MEASURES` -> the measure.
    """

    site: FFNSite
    n_tokens: int
    values: Mapping[str, OverTokens]

    def flat(self, label: str) -> dict[str, Any]:
        """Flat row for CSV and JSON, under the label of the selection."""
        row: dict[str, Any] = {"label": label, "site": self.site.name, "layer": self.site.layer}
        row["n_tokens"] = self.n_tokens
        for name, one in self.values.items():
            row[name] = one.summary.mean
            row |= {f"{name}_p5": one.summary.p5, f"{name}_p95": one.summary.p95}
            row |= {f"{name}_low": one.estimate.low, f"{name}_high": one.estimate.high}
        return row


@torch.no_grad()
def measure_sites(
    model: nn.Module,
    traces: Traces,
    selectors: Mapping[FFNSite, Select],
    label: Label,
    *,
    part: Part = "test",
    chunk: int = 1024,
    on_site: Callable[[int, int], None] | None = None,
) -> list[SiteMeasures]:
    """Measure selections on the tokens of one part of the documents, against the dense FFN and the oracle.

    Inputs are those of the dense model: what earlier sparse FFNs change is not in here but in the perplexity. FFNs that
    no token of the part reached are left out. A prompt-static predictor is measured with the scores that it has.

    Args:
        model: gives the weights; not run.
        traces: gives inputs and documents.
        selectors: site -> selection.
        label: which channels recall and precision are about.
        part: of the documents.
        chunk: tokens at a time; changes memory, not results.
        on_site: called after each FFN with FFNs done, and FFNs in all.
    """
    found: list[SiteMeasures] = []
    for done, (site, select) in enumerate(selectors.items(), 1):
        x = traces.x(site, part)
        if len(x):
            ffn = ffn_of(model, site, traces.activation(site))
            rows: list[dict[str, Tensor]] = []
            for tokens, truth in truths(ffn, x, label, chunk):
                mask = select(tokens)
                rows.append(of_mask(mask, truth) | oracle_gaps(mask, truth))
            document = traces.document[traces.tokens(site, part)]
            values = {name: _over(torch.cat([row[name] for row in rows]), document) for name in SITE_MEASURES}
            found.append(SiteMeasures(site, len(x), values))
        if on_site is not None:
            on_site(done, len(selectors))
    return found


def _over(values: Tensor, document: Tensor) -> OverTokens:
    return OverTokens(summarise(values), over_documents(values, document))
