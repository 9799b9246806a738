"""What the chosen selections do, FFN by FFN, on documents of the calibration, on others, and on another text."""

from __future__ import annotations

import torch
from torch import Tensor

from ffnscope.sparse.card import Band, Figure, SiteCard, Source, WantedChannels
from ffnscope.sparse.figures import DocumentMeasures, site_figures
from ffnscope.sparse.monitor import SIGNALS, band_of, signals
from ffnscope.sparse.readings import Readings, readings_of
from ffnscope.sparse.selector import Selector, measure_selector
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
            readings = self._readings(one, site, source)
            if readings is not None:
                measures = measure_selector(selector, one.predictor, readings, self._label, CHUNK)
                found[source] = site_figures(measures, readings.document)
                whole.add(measures.values, readings.document)
        return SiteCard(
            site=site,
            activation=self._traces.activation(site),
            parameter=one.parameters[setting],
            density=float(one.density[setting]),
            bytes_read=one.bytes_read(setting),
            bytes_dense=one.bytes_dense,
            break_even=one.break_even,
            bands={} if selector is None else self._bands(one, site, selector),
            figures=found,
            source=one.source,
        )

    def whole(self) -> dict[Source, dict[str, Figure]]:
        """Of all FFNs together."""
        return {source: one.figures() for source, one in self._whole.items() if one.sums}

    def _readings(self, one: FittedSite, site: FFNSite, source: Source) -> Readings | None:
        """The tokens of a text; None for none."""
        ahead = one.predictor.lookahead
        if source == "second":
            assert self._second is not None
            if not len(self._second.tokens(site)):
                return None
            return readings_of(one.predictor, self._second.all_tokens(site, lookahead=ahead))
        if not len(self._traces.tokens(site, source)):
            return None
        return readings_of(one.predictor, self._traces.fit_tokens(site, source, lookahead=ahead))

    @torch.no_grad()
    def _bands(self, one: FittedSite, site: FFNSite, selector: Selector) -> dict[str, Band]:
        parts: dict[str, list[Tensor]] = {name: [] for name in SIGNALS}
        readings = self._readings(one, site, "calibrate")
        assert readings is not None, "an FFN without calibration tokens is left out"
        for _, seen in readings.chunks(one.predictor, CHUNK):
            scores = one.predictor(seen)
            for name, values in signals(scores, selector.of_scores(scores)).items():
                parts[name].append(values.cpu())
        return {name: band_of(torch.cat(values)) for name, values in parts.items()}
