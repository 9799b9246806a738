"""The `DecoderGraph` of a model: which branches there are, and how their weights are read."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from functools import partial

from torch import Tensor, nn

from ffnscope.errors import UsageError
from ffnscope.ffn.offload import is_offloaded, stored
from ffnscope.ffn.probe import layer_path
from ffnscope.ffn.projection import canonical_weight, owner_of
from ffnscope.graph import Branch, DecoderGraph, Matrix
from ffnscope.types import FFNSite


def decoder_graph(model: nn.Module, sites: Sequence[FFNSite]) -> DecoderGraph:
    """Graph of the given FFNs of a model, in their order; no weight is read yet.

    Raises:
        UsageError: no site, or sites of different residual width.
        LayoutError: later, when a weight is read, if a site is not in this model.
    """
    if not sites:
        raise UsageError("a graph needs at least one FFN site; find_sites(model) lists those of a model.")
    steps: dict[str, list[Branch]] = {}
    for site in sites:
        steps.setdefault(layer_path(site.path) or site.path, []).append(_branch(model, site))
    return DecoderGraph(sites[0].d_model, tuple(tuple(step) for step in steps.values()))


def _branch(model: nn.Module, site: FFNSite) -> Branch:
    wide, narrow = (site.d_ff, site.d_model), (site.d_model, site.d_ff)
    gate = None if site.gate is None else _matrix(model, site, "gate", wide)
    return Branch(site, _matrix(model, site, "up", wide), _matrix(model, site, "down", narrow), gate)


def _matrix(model: nn.Module, site: FFNSite, role: str, shape: tuple[int, int]) -> Matrix:
    return Matrix(f"{site.name}.{getattr(site, role)}", shape, partial(_opened, model, site, role))


@contextlib.contextmanager
def _opened(model: nn.Module, site: FFNSite, role: str) -> Generator[Tensor]:
    """One weight of a site as [out, in]; an offloaded one is fetched for the block and does not enter the model."""
    name = getattr(site, role)
    owner = owner_of(model, site, name)
    leaf = "weight" if site.expert is None else name.rpartition(".")[2]
    value: Tensor = getattr(owner, leaf)
    if is_offloaded(value):
        place = stored(model, owner, leaf)
        value = place.value.to(place.device)
    yield canonical_weight(model, site, role, value.detach())
