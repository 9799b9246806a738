"""A short probe of how long it takes to fit: some documents of a text are traced in one layer, and a fit is timed.

From two sizes follow the seconds of an FFN however short the text is (an SVD, compiled code) and those of a token.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ffnscope.calibrate.windows import Windows
from ffnscope.ffn.offload import materialised
from ffnscope.sparse.card_figures import CardFigures
from ffnscope.sparse.card_options import CardOptions, CardTarget
from ffnscope.sparse.ffn import ffn_of
from ffnscope.sparse.fit import site_job
from ffnscope.sparse.rule import SelectionRule
from ffnscope.sparse.site_fit import SiteTokens, fit_site
from ffnscope.sparse.site_params import site_params
from ffnscope.sparse.split import PARTS, split_documents
from ffnscope.sparse.streaming import trace_rounds
from ffnscope.sparse.traces import Traces
from ffnscope.sparse.tracing import tokens_of, write_inputs
from ffnscope.types import FFNSite

DOCUMENTS = (5, 10)
"""Of each text: a fifth of either calibrates, and a fifth tests."""
TOKENS = 128
"""Of each document, and of a prompt twice as many as it has."""


@dataclass(frozen=True, slots=True)
class FitTime:
    """Seconds of a fit, and memory of what it makes.

    Attributes:
        fixed: of each FFN, whatever the text.
        per_token: of each token in each FFN.
        predictor_bytes: that the predictor of an FFN holds beside the model.
    """

    fixed: float
    per_token: float
    predictor_bytes: int = 0

    def of(self, n_sites: int, rows: float) -> float:
        """Seconds for so many FFNs, and tokens of all of them together."""
        return self.fixed * n_sites + self.per_token * rows


def probe_fit(
    model: nn.Module,
    windows: Windows,
    sites: Sequence[FFNSite],
    rule: SelectionRule,
    target: CardTarget,
    options: CardOptions,
) -> FitTime:
    """Time one FFN of a card: its predictor, its settings, what these lose, and the figures of one of them.

    Raises:
        UsageError: so little text has no setting that meets the target, or fewer than three documents.
        NotAvailableError, NonFiniteError: as `trace`.
    """
    job = site_job(rule, target, options)

    def fit(traces: Traces) -> tuple[int, int]:
        site = _of_most_tokens(traces, lookahead=rule.lookahead)
        source = traces.before(site) if rule.lookahead else None
        ahead = int(source is not None)
        given, judged = (traces.fit_tokens(site, part, lookahead=ahead) for part in PARTS[:2])
        with materialised(model, site):
            params = site_params(rule, model, [site])[site]
            ffn = ffn_of(model, site, traces.activation(site))
            fitted = fit_site(ffn, SiteTokens(given, judged, None, source, params), job)
            CardFigures(traces, None, options.wanted).site(site, fitted, len(fitted.parameters) - 1)
        return len(traces.tokens(site)), predictor_bytes(fitted.predictor)

    layers = sorted({site.layer for site in sites})[: 2 if rule.lookahead else 1]
    return fit_time(model, [windows], [s for s in sites if s.layer in layers], lambda traces: fit(*traces), rule.prompt)


def fit_time(
    model: nn.Module,
    texts: Sequence[Windows],
    sites: Sequence[FFNSite],
    fit: Callable[[Sequence[Traces]], tuple[int, int]],
    prompt: int = 0,
) -> FitTime:
    """Time ``fit`` on traces of some documents of each text.

    It returns how many tokens of FFNs it was given, and the bytes that a predictor holds.
    """
    found: list[tuple[int, float]] = []
    size = 0
    for i, n in enumerate((DOCUMENTS[0], *DOCUMENTS)):  # the first is slower than any other, and does not count
        with tempfile.TemporaryDirectory() as folder:
            small = [_documents(one, n, max(TOKENS, 2 * prompt)) for one in texts]
            traces = [_traces(model, one, sites, Path(folder) / f"text_{k}") for k, one in enumerate(small)]
            start = time.perf_counter()
            rows, size = fit(traces)
            found += [(rows, time.perf_counter() - start)] if i else []
    (few, short), (many, long) = found
    if many == few:
        return FitTime(0.0, short / few, size)
    per_token = max(0.0, (long - short) / (many - few))
    return FitTime(max(0.0, short - per_token * few), per_token, size)


def predictor_bytes(predictor: nn.Module) -> int:
    """Memory that a predictor holds: its tensors, and what it made of them; not the weights of the FFN."""
    tensors = [
        value
        for module in predictor.modules()
        for value in (*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values())
        if isinstance(value, Tensor)
    ]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def _documents(windows: Windows, n: int, length: int) -> Windows:
    """The beginning of the first window of each of the first documents."""
    documents = windows.document.unique()[:n]
    rows = torch.tensor([int((windows.document == one).nonzero()[0]) for one in documents])
    some, cut = windows[rows], slice(None, length)
    return Windows(some.input_ids[:, cut], some.valid[:, cut], some.targets[:, cut], some.document, some.source)


def _traces(model: nn.Module, windows: Windows, sites: Sequence[FFNSite], folder: Path) -> Traces:
    """Traces that are not kept, with no index and no hashes."""
    folder.mkdir()
    files = {site: folder / f"site_{i:04d}.safetensors" for i, site in enumerate(sites)}
    for found in trace_rounds(model, sites, list(windows.batches(1))):
        for site, one in found.items():
            write_inputs(files[site], one, {})
    tokens = tokens_of(windows)
    return Traces(folder, files, **tokens, parts=split_documents(tokens["document"]), facts={})


def _of_most_tokens(traces: Traces, *, lookahead: int) -> FFNSite:
    """An FFN in the last of the traced layers: of experts the one whose rarest part has most tokens."""
    last = max(site.layer for site in traces.sites) if lookahead else traces.sites[0].layer
    there = [site for site in traces.sites if site.layer == last]
    return max(there, key=lambda site: min(len(traces.tokens(site, part)) for part in PARTS))
