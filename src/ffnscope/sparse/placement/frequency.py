"""How often every channel is selected, over the tokens of traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ffnscope.errors import UsageError, unknown_name
from ffnscope.sparse.split import Part
from ffnscope.sparse.traces import Traces
from ffnscope.types import FFNSite

CHUNK = 256  # tokens whose masks are held at a time
OnSite = Callable[[int, int], None]


def channel_frequencies(
    traces: Traces,
    selectors: Mapping[FFNSite, Callable[[Tensor], Tensor]],
    part: Part | None = None,
    on_site: OnSite | None = None,
) -> dict[FFNSite, Tensor]:
    """Share of the tokens for which every channel is selected, [d_ff] float64 per site.

    The selectors are those that the runtime is to use (for a ReLU model `NonZero`). For an expert it is the share of
    all tokens, those that are not routed to it included, since that is how often its rows are read.

    Args:
        traces: inputs of the FFNs.
        selectors: site -> rule, x [T, d_model] -> mask [T, d_ff].
        part: of the documents; None takes all.
        on_site: called with (sites done, sites in all).

    Raises:
        UsageError: a site was not traced, or there are no tokens.
    """
    n_tokens = len(traces.document)
    if part is not None:
        n_tokens = int(torch.isin(traces.document, traces.parts[part]).sum())
    if not n_tokens:
        raise UsageError("the traces have no tokens there, so nothing is known about frequencies; trace more text.")
    found: dict[FFNSite, Tensor] = {}
    for done, (site, selector) in enumerate(selectors.items(), 1):
        if site not in traces.files:
            raise unknown_name("traced site", site.name, [s.name for s in traces.files])
        counts = torch.zeros(site.d_ff, dtype=torch.float64)
        for mask in masks_of(traces.x(site, part), selector):
            counts += mask.sum(0).double().cpu()
        found[site] = counts / n_tokens
        if on_site is not None:
            on_site(done, len(selectors))
    return found


def masks_of(x: Tensor, selector: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """Masks [t, d_ff] of inputs [T, d_model], some tokens at a time."""
    for part in x.split(CHUNK):
        yield selector(part)
