"""Random decoder graphs held in memory, and the same graphs as one dense matrix."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ffnscope.graph import Branch, DecoderGraph, Matrix
from ffnscope.types import ChannelStats, FFNSite, ObservedSite

D_MODEL, VOCABULARY, TOKENS = 6, 9, 100


@dataclass
class Example:
    """A graph, its statistics, its weights by name, and how often each was read."""

    graph: DecoderGraph
    stats: dict[FFNSite, ChannelStats]
    weights: dict[str, Tensor]
    reads: Counter = field(default_factory=Counter)


class Builder:
    """Draws weights and statistics."""

    def __init__(self, seed: int):
        self.random = torch.Generator().manual_seed(seed)
        self.weights: dict[str, Tensor] = {}
        self.stats: dict[FFNSite, ChannelStats] = {}
        self.reads: Counter = Counter()

    def matrix(self, name: str, *shape: int) -> Matrix:
        self.weights[name] = torch.randn(*shape, generator=self.random, dtype=torch.float64)
        return Matrix(name, shape, partial(self._open, name))

    @contextlib.contextmanager
    def _open(self, name: str) -> Generator[Tensor]:
        self.reads[name] += 1
        yield self.weights[name]

    def observe(self, site: FFNSite, count: int = TOKENS, **sizes: int) -> None:
        values = {
            k: count * (0.1 + torch.rand(n, generator=self.random, dtype=torch.float64)) for k, n in sizes.items()
        }
        self.stats[site] = ChannelStats(site, values, dict.fromkeys(sizes, count), dict.fromkeys(sizes, "sum"))

    def ffn(self, layer: int, d_ff: int, *, gated: bool, expert: int | None = None, count: int = TOKENS) -> Branch:
        names = ("gate", "up", "down") if gated else (None, "up", "down")
        storage = "linear"
        site = FFNSite(layer, f"layers.{layer}.mlp", *names, D_MODEL, d_ff, "silu", None, expert, storage)
        sizes = {"act_sq": d_ff, "taylor_sq": d_ff, "x_sq": D_MODEL, "y_sq": D_MODEL}
        self.observe(site, count, **sizes)
        gate = self.matrix(f"{site.name}.gate", d_ff, D_MODEL) if gated else None
        up, down = self.matrix(f"{site.name}.up", d_ff, D_MODEL), self.matrix(f"{site.name}.down", D_MODEL, d_ff)
        norm = torch.rand(D_MODEL, generator=self.random, dtype=torch.float64) + 0.5
        return Branch(site, up, down, gate, norm=norm)

    def attention(self, layer: int, sources: list[int], *, out_norm: bool = False, gain: float = 1.0) -> Branch:
        site = ObservedSite(layer, f"layers.{layer}.attn", None, "v", "o", D_MODEL, len(sources), kind="attention")
        sizes = {"stream_sq": len(sources), "stream_taylor_sq": len(sources), "x_sq": D_MODEL, "y_sq": D_MODEL}
        self.observe(site, **sizes)
        up = self.matrix(f"{site.name}.v", max(sources) + 1, D_MODEL)
        down = self.matrix(f"{site.name}.o", D_MODEL, len(sources))
        after = torch.rand(D_MODEL, generator=self.random, dtype=torch.float64) + 0.5 if out_norm else None
        return Branch(site, up, down, None, torch.tensor(sources), out_norm=after, gain=gain)

    def cut(self, index: int) -> ObservedSite:
        site = ObservedSite(0, f"cut{index}", None, "n", "n", D_MODEL, D_MODEL, kind="cut")
        self.observe(site, stream_sq=D_MODEL, stream_grad_sq=D_MODEL)
        return site


def example(seed: int = 0) -> Example:
    """Gated FFN; attention of shared values before a norm; experts and a shared one; attention beside a plain FFN."""
    b = Builder(seed)
    experts = tuple(b.ffn(1, 4, gated=True, expert=e, count=n) for e, n in enumerate((30, 70)))
    steps = (
        (b.ffn(0, 5, gated=True),),
        (b.attention(1, [0, 1, 0, 1, 2], out_norm=True, gain=0.5),),
        (*experts, b.ffn(2, 3, gated=True)),
        (b.attention(3, [0, 1, 2]), b.ffn(3, 4, gated=False)),
    )
    cuts = tuple(b.cut(i) for i in range(len(steps) + 1))
    head = ObservedSite(0, "", None, "head", "head", D_MODEL, D_MODEL, kind="unembedding")
    b.observe(head, stream_sq=D_MODEL)
    matrix = b.matrix("head", VOCABULARY, D_MODEL)
    return Example(DecoderGraph(D_MODEL, steps, cuts, matrix, head), b.stats, b.weights, b.reads)


@dataclass
class Dense:
    """A graph as one matrix, ``strength[target, source]``.

    ``halves`` are the shares of each target's sources: of a node, half by gate and half by up. ``cuts`` and ``nodes``
    tell where the entries of each cut and of each branch are.
    """

    strength: Tensor
    halves: Tensor
    cuts: list[slice]
    nodes: dict[FFNSite, slice]


def dense(one: Example, strength: str) -> Dense:
    """Every edge by its definition, entry by entry."""
    graph, nodes, cuts, size = one.graph, {}, [slice(0, D_MODEL)], D_MODEL
    for step in graph.steps:
        for branch in step:
            nodes[branch.site] = slice(size, size + branch.up.shape[0])
            size += branch.up.shape[0]
        cuts.append(slice(size, size + D_MODEL))
        size += D_MODEL
    found = Dense(
        torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64), cuts, nodes
    )
    for index, step in enumerate(graph.steps):
        for branch in step:
            _fill(one, found, index, branch, strength)
        before, after = cuts[index], cuts[index + 1]
        found.strength[after, before] += torch.diag(_skip(one, index, strength))
        rows = found.strength[after]
        found.halves[after] = rows / rows.sum(1, keepdim=True)
    return found


def _rms(one: Example, site: FFNSite, name: str, count: int = TOKENS) -> Tensor:
    return (one.stats[site].values[name] / count).sqrt()


def _target(one: Example, index: int, strength: str) -> Tensor:
    if strength != "gradient":
        return torch.ones(D_MODEL, dtype=torch.float64)
    return _rms(one, one.graph.cuts[index + 1], "stream_grad_sq")


def _skip(one: Example, index: int, strength: str) -> Tensor:
    if strength == "weight":
        return torch.ones(D_MODEL, dtype=torch.float64)
    power = 2 if strength == "energy" else 1
    return _rms(one, one.graph.cuts[index], "stream_sq") ** power * _target(one, index, strength)


def _fill(one: Example, found: Dense, index: int, branch: Branch, strength: str) -> None:
    power = 2 if strength == "energy" else 1
    site, rows = branch.site, branch.up.shape[0]
    sources = torch.arange(rows) if branch.sources is None else branch.sources
    down = one.weights[branch.down.name].abs() ** power
    ones = torch.ones(D_MODEL, dtype=torch.float64)
    into = branch.gain * (ones if branch.out_norm is None else branch.out_norm)
    if strength != "weight":
        if branch.out_norm is not None:
            into = into / (one.stats[site].values["y_sq"] / TOKENS).mean().sqrt()
        down = down * _rms(one, site, "act_sq" if branch.is_ffn else "stream_sq") ** power
    into = into**power * _target(one, index, strength)
    place = found.nodes[site]
    for channel, source in enumerate(sources.tolist()):
        found.strength[found.cuts[index + 1], place.start + source] += into * down[:, channel]
    reads = [one.weights[m.name].abs() ** power for m in branch.readers]
    x = (ones if branch.norm is None else branch.norm) if strength == "weight" else _rms(one, site, "x_sq") ** power
    halves = sum((r * x) / (r * x).sum(1, keepdim=True) for r in reads) / len(reads)
    found.halves[place, found.cuts[index]] = halves
    total = found.strength[found.cuts[index + 1], place].sum(0)
    if strength == "gradient":
        name = "taylor_sq" if branch.is_ffn else "stream_taylor_sq"
        total = torch.zeros(rows, dtype=torch.float64).index_add_(0, sources, _rms(one, site, name))
    plain = sum(r * x for r in reads)
    found.strength[place, found.cuts[index]] = plain if strength == "weight" else total[:, None] * halves
