"""How strong the edges of a decoder graph are: vectors that multiply the entries of its weights.

An entry W of a reading matrix is the edge from residual channel d to channel n, of strength |W|^power read[d]; an entry
of down the edge from channel n to residual channel d, of strength |W|^power write[n] into[d]; a skip edge is skip[d].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ffnscope.errors import UsageError, unknown_name
from ffnscope.graph import Branch, DecoderGraph
from ffnscope.metrics.blocks import column_sums
from ffnscope.types import ChannelStats, FFNSite

Strength = Literal["weight", "contribution", "energy", "gradient"]
Stats = Mapping[FFNSite, ChannelStats]

FORWARD = ("act_sq", "x_sq", "y_sq", "stream_sq")
BACKWARD = ("taylor_sq", "stream_taylor_sq", "stream_grad_sq")


def edge_statistics(params: Mapping[str, Any]) -> tuple[str, ...]:
    """Statistics that edges of ``params["strength"]`` need; "energy" by default."""
    strength = params.get("strength", "energy")
    if strength not in get_args(Strength):
        raise unknown_name("edge strength", str(strength), get_args(Strength))
    if strength == "weight":
        return ()
    return (*FORWARD, *BACKWARD) if strength == "gradient" else FORWARD


@dataclass(frozen=True, slots=True, eq=False)
class BranchEdges:
    """Edges of one branch, float64 on the CPU.

    Attributes:
        branch: the branch.
        power: 1 = |W|, 2 = W^2.
        read: [d_model].
        write: [d_ff].
        into: [d_model].
        incoming: what the reading edges of each node are scaled to sum up to, half by gate and half by up, [n_nodes];
            None leaves them as they are.
        balanced: ``incoming`` is what the node writes, which `ffnscope.metrics.sweeps.resolved` finds.
    """

    branch: Branch
    power: int
    read: Tensor
    write: Tensor
    into: Tensor
    incoming: Tensor | None = None
    balanced: bool = False

    @property
    def n_nodes(self) -> int:
        """Nodes of the branch: its channels, or the values that the channels of an attention share."""
        return self.branch.up.shape[0]

    def merged(self, channels: Tensor) -> Tensor:
        """Sum a value per channel [d_ff] over the channels of each node [n_nodes]."""
        if self.branch.sources is None:
            return channels
        return torch.zeros(self.n_nodes, dtype=channels.dtype).index_add_(0, self.branch.sources, channels)

    def spread(self, nodes: Tensor) -> Tensor:
        """Value of each node [n_nodes] at each of its channels [d_ff]."""
        return nodes if self.branch.sources is None else nodes[self.branch.sources]


@dataclass(frozen=True, slots=True, eq=False)
class StepEdges:
    """Edges between one cut and the next; ``skip`` [d_model]."""

    branches: tuple[BranchEdges, ...]
    skip: Tensor


def step_edges(graph: DecoderGraph, stats: Stats, index: int, strength: Strength) -> StepEdges:
    """Edges of one step of the graph.

    * ``weight``: |W|, times the weight of a norm that it is read or written through; skip edges are 1.
    * ``contribution``: |W_ij| rms(x_j), the size of what j adds to i; skip edges rms(residual).
    * ``energy``: W_ij^2 E[x_j^2], which adds up over uncorrelated terms; skip edges E[residual^2].
    * ``gradient``: contribution times the rms of the gradient at the target: by Cauchy and Schwarz a bound on
      E|x_j W_ij g_i|, which itself would take a number per edge.

    What a channel reads goes through its activation, so the reading edges tell only how it is shared out: half of it is
    gate's and half up's, and together they are scaled to what the channel writes (gradient: to rms(h g), which is
    measured). So they have the unit of the stream, and nothing changes when up is multiplied by what down is divided
    by. ``weight`` leaves them as they are. Means are over all tokens, so the edges of an expert are weighted by its
    share of them.

    Raises:
        UsageError: a statistic that the strength needs was not collected.
    """
    branches = graph.steps[index]
    if strength == "weight":
        return StepEdges(tuple(_by_weight(b) for b in branches), torch.ones(graph.d_model, dtype=torch.float64))
    size = _Sizes(graph, stats, index, 2 if strength == "energy" else 1)
    target = size.gradient() if strength == "gradient" else torch.ones(graph.d_model, dtype=torch.float64)
    edges = tuple(_measured(b, size, target, scaled=strength == "gradient") for b in branches)
    return StepEdges(edges, size.cut() * target)


def seed_of(graph: DecoderGraph, stats: Stats, strength: Strength) -> Tensor:
    """Share [d_model] of the logits that each channel of the last cut has, sum 1: mean |unembedding| times its size.

    Without an unembedding, all channels count equally.
    """
    ones = torch.ones(graph.d_model, dtype=torch.float64)
    if graph.head is None or graph.head_site is None:
        return ones / graph.d_model
    power = 2 if strength == "energy" else 1
    size = graph.head_norm if strength == "weight" else _mean(stats, graph.head_site, "stream_sq").pow(power / 2)
    seed = column_sums(graph.head, power) * (ones if size is None else size)
    return seed / seed.sum()


def entry_of(graph: DecoderGraph, stats: Stats, strength: Strength) -> Tensor:
    """Share [d_model] of the embedding that each channel of the first cut has, sum 1."""
    start = step_edges(graph, stats, 0, "contribution" if strength == "gradient" else strength).skip
    return start / start.sum()


@dataclass(frozen=True, slots=True, eq=False)
class _Sizes:
    """Sizes of signals around one step: rms for power 1, mean squares for power 2, over all tokens of the text."""

    graph: DecoderGraph
    stats: Stats
    index: int
    power: int

    def cut(self) -> Tensor:
        return _mean(self.stats, self._cut(self.index), "stream_sq").pow(self.power / 2)

    def gradient(self) -> Tensor:
        return _mean(self.stats, self._cut(self.index + 1), "stream_grad_sq").sqrt()

    def of(self, site: FFNSite, name: str) -> Tensor:
        """Of a signal of a branch; an expert's tokens are a part of all."""
        known = _known(self.stats, site)
        if site.expert is None:
            return known.mean(name).pow(self.power / 2)
        gradient = name == "taylor_sq"
        cut = self._cut(self.index + gradient)
        count = _known(self.stats, cut).counts["stream_grad_sq" if gradient else "stream_sq"]
        return (known.total(name) / count).pow(self.power / 2)

    def _cut(self, index: int) -> FFNSite:
        site = self.graph.cuts[index] if self.graph.cuts else None
        if site is None:
            raise UsageError(
                f"the size of the residual stream at cut {index} is not known: the graph has no site for it. Use "
                "strength='weight', which needs no text."
            )
        return site


def _by_weight(branch: Branch) -> BranchEdges:
    ones = torch.ones(branch.site.d_model, dtype=torch.float64)
    read = ones if branch.norm is None else branch.norm.double()
    into = branch.gain * (ones if branch.out_norm is None else branch.out_norm.double())
    return BranchEdges(branch, 1, read, torch.ones(branch.site.d_ff, dtype=torch.float64), into)


def _measured(branch: Branch, size: _Sizes, target: Tensor, *, scaled: bool) -> BranchEdges:
    site = branch.site
    ffn = branch.is_ffn
    write = size.of(site, "act_sq" if ffn else "stream_sq")
    gain = torch.full((site.d_model,), branch.gain, dtype=torch.float64)
    if branch.out_norm is not None:
        put_out = _known(size.stats, site).mean("y_sq").mean().sqrt()
        gain = gain * branch.out_norm.double() / put_out.clamp_min(torch.finfo(torch.float64).tiny)
    into = gain.pow(size.power) * target
    edges = BranchEdges(branch, size.power, size.of(site, "x_sq"), write, into, balanced=not scaled)
    if not scaled:
        return edges
    return replace(edges, incoming=edges.merged(size.of(site, "taylor_sq" if ffn else "stream_taylor_sq")))


def _known(stats: Stats, site: FFNSite) -> ChannelStats:
    if site not in stats:
        raise UsageError(
            f"statistics of {site.name} are missing. Calibrate for this metric: calibrate(model, windows, [metric]) "
            "also observes the residual stream and attention."
        )
    return stats[site]


def _mean(stats: Stats, site: FFNSite, name: str) -> Tensor:
    return _known(stats, site).mean(name).double()
