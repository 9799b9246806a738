"""What the chosen selections do, FFN by FFN, on documents of the calibration, on others, and on another text."""

from __future__ import annotations

import torch
from torch import Tensor

from ffnscope.sparse.card import Band, Figure, SiteCard, Source, WantedChannels
from ffnscope.sparse.figures import DocumentMeasures, site_figures
from ffnscope.sparse.measures import Select, measure
from ffnscope.sparse.monitor import SIGNALS, band_of, signals
from ffnscope.sparse.selector import Selector
from ffnscope.sparse.site_fit import FittedSite
from ffnscope.sparse.traces import Traces
from ffnscope.types import FFNSite

CHUNK = 1024


class CardFigures:
    """Figures of FFNs one after the other, and then of all of them together.

    Args:
        traces: of the calibration's text.
        second: of another text, or None.
        wanted: channels that recall is about.
    """

    def __init__(self, traces: Traces, second: Traces | None, wanted: WantedChannels):
        self._traces, self._second, self._label = traces, second, wanted.label
        self._whole: dict[Source, DocumentMeasures] = {
            "calibrate": DocumentMeasures(traces.parts["calibrate"]),
            "test": DocumentMeasures(traces.parts["test"]),
        }
        if second is not None:
            self._whole["second"] = DocumentMeasures(second.document.unique())

    def site(self, site: FFNSite, one: FittedSite, setting: int) -> SiteCard:
        """The card of one FFN at a setting. A text without tokens for it (an expert) has no figures."""
        selector = one.selector(setting)
        found: dict[Source, dict[str, Figure]] = {}
        for source, whole in self._whole.items():
            x, document = self._tokens(site, source)
            if len(x):
                measures = measure(one.predictor.ffn, selector or _all(one), x, self._label, CHUNK)
                found[source] = site_figures(measures, document)
                whole.add(measures.values, document)
        return SiteCard(
            site=site,
            activation=self._traces.activation(site),
            parameter=one.parameters[setting],
            density=float(one.density[setting]),
            bytes_read=one.bytes_read(setting),
            bytes_dense=one.bytes_dense,
            break_even=one.break_even,
            bands={} if selector is None else self._bands(site, selector),
            figures=found,
        )

    def whole(self) -> dict[Source, dict[str, Figure]]:
        """Of all FFNs together."""
        return {source: one.figures() for source, one in self._whole.items() if one.sums}

    def _tokens(self, site: FFNSite, source: Source) -> tuple[Tensor, Tensor]:
        if source == "second":
            assert self._second is not None
            return self._second.x(site), self._second.document[self._second.tokens(site)]
        return self._traces.x(site, source), self._traces.document[self._traces.tokens(site, source)]

    @torch.no_grad()
    def _bands(self, site: FFNSite, selector: Selector) -> dict[str, Band]:
        parts: dict[str, list[Tensor]] = {name: [] for name in SIGNALS}
        for x in self._tokens(site, "calibrate")[0].split(CHUNK):
            scores = selector.predictor(x)
            for name, values in signals(scores, selector.policy.select(scores, selector.parameter)).items():
                parts[name].append(values.cpu())
        return {name: band_of(torch.cat(values)) for name, values in parts.items()}


def _all(one: FittedSite) -> Select:
    ffn = one.predictor.ffn
    return lambda x: torch.ones(len(x), ffn.d_ff, dtype=torch.bool, device=ffn.weights.up.device)
