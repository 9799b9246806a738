"""The `DecoderGraph` of a model: which branches there are, and how their weights are read."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from functools import partial

from torch import Tensor, nn

from ffnscope.ffn.offload import is_offloaded, materialised, stored
from ffnscope.ffn.projection import canonical_weight, out_width, owner_of, projection, weights_of
from ffnscope.ffn.stream import Reader, Stream, find_stream
from ffnscope.graph import Branch, DecoderGraph, Matrix
from ffnscope.types import FFNSite


def decoder_graph(model: nn.Module, sites: Sequence[FFNSite], stream: Stream | None = None) -> DecoderGraph:
    """Graph of the decoder around the given FFNs of a model; no weight is read yet.

    The model is run once on a few tokens, unless its ``stream`` is known. FFNs that are not among the sites are
    not in the graph. What was not recognised is named in ``missing``.

    Raises:
        UsageError: no site, or sites of different residual width.
        LayoutError: later, when a weight is read, if a site is not in this model.
    """
    found = stream or find_stream(model, sites)
    steps = tuple(tuple(_branch(model, reader) for reader in step) for step in found.steps)
    head = found.unembedding
    matrix = None
    if head is not None:
        matrix = _matrix(model, head, "down", (out_width(projection(model, head, head.down)), head.d_model))
    return DecoderGraph(sites[0].d_model, steps, found.cuts, matrix, head, found.head_norm, found.missing)


def _branch(model: nn.Module, reader: Reader) -> Branch:
    site = reader.site
    wide, narrow = (site.d_ff, site.d_model), (site.d_model, site.d_ff)
    gate = None if site.gate is None else _matrix(model, site, "gate", wide)
    up, sources = _matrix(model, site, "up", wide), reader.sources
    if sources is not None:  # the rows of the values alone: queries and keys may be in the same matrix
        first, last = int(sources.min()), int(sources.max()) + 1
        up = _matrix(model, site, "up", (last - first, site.d_model), slice(first, last))
        sources = sources - first
    down = _matrix(model, site, "down", narrow)
    return Branch(site, up, down, gate, sources, reader.norm, reader.out_norm, reader.gain)


def _matrix(model: nn.Module, site: FFNSite, role: str, shape: tuple[int, int], rows: slice = slice(None)) -> Matrix:
    opened, bias = partial(_opened, model, site, role, rows), partial(_bias, model, site, role)
    return Matrix(f"{site.name}.{getattr(site, role)}", shape, opened, bias)


def _bias(model: nn.Module, site: FFNSite, role: str) -> Tensor | None:
    """A copy of the bias of gate, up or down."""
    with materialised(model, site):
        bias = getattr(weights_of(model, site), f"{role}_bias")
        return None if bias is None else bias.clone()


@contextlib.contextmanager
def _opened(model: nn.Module, site: FFNSite, role: str, rows: slice) -> Generator[Tensor]:
    """One weight of a site as [out, in]; an offloaded one is fetched for the block and does not enter the model."""
    name = getattr(site, role)
    owner = owner_of(model, site, name)
    leaf = "weight" if not site.stacked else name.rpartition(".")[2]
    value: Tensor = getattr(owner, leaf)
    if is_offloaded(value):
        place = stored(model, owner, leaf)
        value = place.value.to(place.device)
    yield canonical_weight(model, site, role, value.detach())[rows]
