"""Centralities of FFN channels in the graph of the whole decoder; docs/centrality.md tells them apart.

All are matrix-free: the graph has no cycle, so that one sweep over its steps solves (I - A) x = b exactly. A sweep
reads each weight at most three times, a block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.graph import DecoderGraph
from ffnscope.metrics.edges import Stats, StepEdges, Strength, edge_statistics, entry_of, seed_of, step_edges
from ffnscope.metrics.sweeps import (
    Walk,
    ahead,
    back,
    backward,
    expected,
    forward,
    largest_incoming,
    path_sums,
    resolved,
)
from ffnscope.metrics.teleport import Teleport, teleport_of, teleport_statistics
from ffnscope.registry import metric
from ffnscope.types import FFNSite

Found = dict[FFNSite, Tensor]
Sweep = Callable[[StepEdges, Tensor], tuple[Tensor, Found]]
SOURCE = "influence in a directed acyclic graph, (I - A)^-1"


def walk_statistics(params: Mapping[str, Any]) -> tuple[str, ...]:
    """Statistics that a personalised walk needs."""
    return tuple(dict.fromkeys((*edge_statistics(params), *teleport_statistics(params))))


def _check_katz(*, attenuation: float = 0.9, **others: Any) -> None:
    if not 0 < attenuation <= 1:
        raise UsageError(f"attenuation must be in (0, 1], the share that a path keeps per edge; got {attenuation:g}.")


def _check_hits(*, iterations: int = 20, **others: Any) -> None:
    if iterations < 1:
        raise UsageError(f"iterations must be at least 1; got {iterations}.")


def _check_walk(*, damping: float = 0.85, **others: Any) -> None:
    if not 0 <= damping < 1:
        raise UsageError(f"damping must be in [0, 1), the chance that a walk goes on; got {damping:g}.")


@metric("graph_backward", needs=edge_statistics, scope="model", source=f"{SOURCE}, as in attribution graphs")
def graph_backward(graph: DecoderGraph, stats: Stats, *, strength: Strength = "energy") -> Found:
    """Share of the logits that goes through each channel, from the unembedding backwards; [d_ff] per site.

    Each node hands its value back to its sources in proportion to the strength of their edges, skip edges included. The
    values of every residual cut sum to 1, so a channel's value is a share of one whole in every layer. 0 for a channel
    without weights in down, or that is never active (unless ``strength`` is weight). A gradient at the target cancels
    in a target's shares, so here gradient gives what contribution gives.
    Invariant under up * c, down / c, unless ``strength`` is weight.
    """
    _, found = _swept(_from_the_end(graph, stats, strength), seed_of(graph, stats, strength), backward)
    return _ffns(graph, found)


@metric("graph_forward", needs=edge_statistics, scope="model", source=SOURCE)
def graph_forward(graph: DecoderGraph, stats: Stats, *, strength: Strength = "energy") -> Found:
    """Share of the embedding's walks that visit each channel, from the embedding forwards; [d_ff] per site.

    A walk goes from each node to one of its targets in proportion to the strength of the edge, skip edges included. It
    says what reaches a channel, not what comes of it. 0 for a channel without weights in down, or that is never active
    (unless ``strength`` is weight).
    Invariant under up * c, down / c, unless ``strength`` is weight.
    """
    _, found = _swept(_from_the_start(graph, stats, strength), entry_of(graph, stats, strength), forward)
    return _ffns(graph, found)


@metric("graph_flow", needs=edge_statistics, scope="model", source="flow betweenness, F * B")
def graph_flow(graph: DecoderGraph, stats: Stats, *, strength: Strength = "energy") -> Found:
    """Share of the walks from the embedding to the logits that pass each channel, [d_ff] per site.

    The product of its visits by the walks of graph_forward, and of what these can expect to reach of the unembedding,
    over that of all walks. Sums to 1 over every residual cut. 0 for a channel without weights in down, or that is never
    active (unless ``strength`` is weight).
    Invariant under up * c, down / c, unless ``strength`` is weight.
    """
    cut, visits = _swept(_from_the_start(graph, stats, strength), entry_of(graph, stats, strength), forward)
    value = seed_of(graph, stats, strength)
    whole = max(float(cut @ value), torch.finfo(cut.dtype).tiny)
    _, rewards = _swept(_from_the_end(graph, stats, strength), value, expected)
    return _ffns(graph, {site: visits[site] * reward / whole for site, reward in rewards.items()})


@metric("graph_katz", needs=edge_statistics, scope="model", source="Katz 1953", check=_check_katz)
def graph_katz(graph: DecoderGraph, stats: Stats, *, strength: Strength = "energy", attenuation: float = 0.9) -> Found:
    """Katz centrality: strengths summed over all paths that leave each channel, [d_ff] per site.

    K = 1 + alpha A^T K with strengths as they are and alpha = ``attenuation`` / the largest sum of strengths into one
    node; the 1 of the channel itself is taken off. 0 for a channel without weights in down, or that is never active
    (unless ``strength`` is weight).
    Invariant under up * c, down / c, unless ``strength`` is weight.
    """
    _check_katz(attenuation=attenuation)
    largest = max(largest_incoming(step) for step in _from_the_start(graph, stats, strength))
    walk = Walk(attenuation / largest if largest else 0.0, 1.0, nodes=None)
    cut = torch.ones(graph.d_model, dtype=torch.float64)
    _, found = _swept(_from_the_end(graph, stats, strength), cut, lambda step, c: path_sums(step, c, walk, added=1.0))
    return _ffns(graph, found)


@metric("graph_hub", needs=edge_statistics, scope="model", source="HITS, Kleinberg 1999", check=_check_hits)
def graph_hub(graph: DecoderGraph, stats: Stats, *, strength: Strength = "energy", iterations: int = 20) -> Found:
    """Hub value of HITS: how much a channel writes to what is written by many, [d_ff] per site.

    Of the nodes of one step: the leading right singular vector of the strengths of its edges, by ``iterations`` of two
    reads each; hubs of a step sum to 1, its residual channels included. The leading singular vector of the whole graph
    would be zero but in one step, because no edge leaves a step.
    Invariant under up * c, down / c, unless ``strength`` is weight.
    """
    return _ffns(graph, _hits(graph, stats, strength, iterations)[0])


@metric("graph_authority", needs=edge_statistics, scope="model", source="HITS, Kleinberg 1999", check=_check_hits)
def graph_authority(graph: DecoderGraph, stats: Stats, *, strength: Strength = "energy", iterations: int = 20) -> Found:
    """Authority value of HITS: how much a channel reads of what many read, [d_ff] per site.

    The left singular vector beside that of graph_hub; authorities of a step sum to 1.
    Invariant under up * c, down / c, unless ``strength`` is weight.
    """
    return _ffns(graph, _hits(graph, stats, strength, iterations)[1])


@metric(
    "graph_pagerank",
    needs=walk_statistics,
    scope="model",
    inputs=("background",),
    source="Brin and Page 1998; personalised",
    check=_check_walk,
)
def graph_pagerank(
    graph: DecoderGraph,
    stats: Stats,
    *,
    strength: Strength = "energy",
    damping: float = 0.85,
    teleport: Teleport = "activation",
    background: Stats | None,
) -> Found:
    """Personalised PageRank: how often a walk that starts anew with 1 - ``damping`` is at a channel, [d_ff] per site.

    It follows edges forwards like graph_forward. It starts anew at: every node alike (uniform); FFN channels by the rms
    of what they add to the stream (activation) or of h g (gradient); or by how much more active they are than on a
    background text (contrast): (E[h^2] - E'[h^2]) / (E[h^2] + E'[h^2]), where positive. Values of all nodes of the
    graph sum to 1.
    Invariant under up * c, down / c, unless ``strength`` is weight.
    """
    walk = _walk(graph, stats, damping, teleport, background)
    return _walked(graph, _from_the_start(graph, stats, strength), walk, forward)


@metric(
    "graph_cheirank",
    needs=walk_statistics,
    scope="model",
    inputs=("background",),
    source="PageRank of the reversed graph",
    check=_check_walk,
)
def graph_cheirank(
    graph: DecoderGraph,
    stats: Stats,
    *,
    strength: Strength = "energy",
    damping: float = 0.85,
    teleport: Teleport = "activation",
    background: Stats | None,
) -> Found:
    """PageRank of the reversed graph: what the channels where a walk starts anew build on, [d_ff] per site.

    It follows edges backwards like graph_backward; ``teleport`` and ``damping`` as in graph_pagerank. Values of all
    nodes of the graph sum to 1.
    Invariant under up * c, down / c, unless ``strength`` is weight.
    """
    walk = _walk(graph, stats, damping, teleport, background)
    return _walked(graph, _from_the_end(graph, stats, strength), walk, backward)


def _from_the_start(graph: DecoderGraph, stats: Stats, strength: Strength) -> Iterator[StepEdges]:
    for index in range(len(graph.steps)):
        yield step_edges(graph, stats, index, strength)


def _from_the_end(graph: DecoderGraph, stats: Stats, strength: Strength) -> Iterator[StepEdges]:
    for index in reversed(range(len(graph.steps))):
        yield step_edges(graph, stats, index, strength)


def _swept(steps: Iterable[StepEdges], cut: Tensor, sweep: Sweep) -> tuple[Tensor, Found]:
    """Take a cut through all steps: the last cut, and the values of all nodes."""
    found: Found = {}
    for step in steps:
        cut, nodes = sweep(step, cut)
        found |= nodes
    return cut, found


def _walked(
    graph: DecoderGraph,
    steps: Iterable[StepEdges],
    walk: Walk,
    sweep: Callable[[StepEdges, Tensor, Walk], tuple[Tensor, Found]],
) -> Found:
    """How often a walk that starts anew is at each FFN channel, of all nodes of the graph."""
    cut = torch.zeros(graph.d_model, dtype=torch.float64) + walk.cut
    total = cut.sum()

    def one(step: StepEdges, before: Tensor) -> tuple[Tensor, Found]:
        after, nodes = sweep(step, before, walk)
        total.add_(after.sum() + sum(float(value.sum()) for value in nodes.values()))
        return after, nodes

    _, found = _swept(steps, cut, one)
    return {site: value / total for site, value in _ffns(graph, found).items()}


def _ffns(graph: DecoderGraph, found: Found) -> Found:
    return {site: found[site] for site in graph.sites}


def _walk(graph: DecoderGraph, stats: Stats, damping: float, teleport: Teleport, background: Stats | None) -> Walk:
    _check_walk(damping=damping)
    return teleport_of(graph, stats, damping, teleport, background)


def _hits(graph: DecoderGraph, stats: Stats, strength: Strength, iterations: int) -> tuple[Found, Found]:
    _check_hits(iterations=iterations)
    hubs, authorities = Found(), Found()
    for raw in _from_the_start(graph, stats, strength):
        step = resolved(raw)
        cut = torch.ones(graph.d_model, dtype=torch.float64)
        hub = {e.branch.site: torch.ones(e.n_nodes, dtype=torch.float64) for e in step.branches}
        authority = hub
        for _ in range(iterations):
            after, authority = _unit(*ahead(step, cut, hub))
            cut, hub = _unit(*back(step, after, authority))
        hubs |= hub
        authorities |= authority
    return hubs, authorities


def _unit(cut: Tensor, nodes: Found) -> tuple[Tensor, Found]:
    """Both divided by the sum of all."""
    total = max(float(cut.sum()) + sum(float(v.sum()) for v in nodes.values()), torch.finfo(cut.dtype).tiny)
    return cut / total, {site: value / total for site, value in nodes.items()}
