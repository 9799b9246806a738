"""Measures of tokens as figures: of one FFN with tokens' percentiles, and of all FFNs with documents as the unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ffnscope.evaluate.intervals import sums_by_document
from ffnscope.evaluate.perplexity import window_ratio
from ffnscope.sparse.card import Figure
from ffnscope.sparse.measures import TokenMeasures, summarise


def site_figures(measures: TokenMeasures, document: Tensor) -> dict[str, Figure]:
    """Figures of one FFN from the document of each token [T]."""
    documents = document.unique()
    found: dict[str, Figure] = {}
    for name, values in measures.values.items():
        mean, stderr = window_ratio(*sums_by_document(values, document, documents))
        ends = summarise(values)
        found[name] = Figure(mean, stderr, ends.p5, ends.p95)
    return found


@dataclass(slots=True, eq=False)
class DocumentMeasures:
    """Sums of measures over all FFNs, for each of some documents."""

    documents: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    counts: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def add(self, measures: Mapping[str, Tensor], document: Tensor) -> None:
        """Add the measures of one FFN, name -> [T]."""
        for name, values in measures.items():
            sums, counts = sums_by_document(values, document, self.documents)
            self.sums[name] = self.sums.get(name, 0) + sums
            self.counts[name] = self.counts.get(name, 0) + counts

    def figures(self) -> dict[str, Figure]:
        """Figures over all tokens of all FFNs; p5 and p95 are of documents."""
        found: dict[str, Figure] = {}
        for name, sums in self.sums.items():
            counts = self.counts[name]
            mean, stderr = window_ratio(sums, counts)
            ends = summarise((sums / counts)[counts > 0])
            found[name] = Figure(mean, stderr, ends.p5, ends.p95)
        return found
