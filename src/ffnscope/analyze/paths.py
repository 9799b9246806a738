"""Paths between channels of different layers: what one writes into the residual stream, and how another reads it.

Channel a of an FFN writes h_a * down[:, a]; channel b of a later FFN reads the stream with its rows of gate and up.
The strength of the direct path is rms(h_a) * |row . down[:, a]|, for the row of b where it is larger. What attention
carries and the norm before the later FFN are left out, so strengths compare best among paths into one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from ffnscope.errors import UsageError
from ffnscope.ffn.offload import materialised
from ffnscope.ffn.projection import weights_of
from ffnscope.types import ChannelStats, FFNSite, Scores


@dataclass(frozen=True, slots=True)
class ChannelNode:
    """A channel in a graph of the model.

    Attributes:
        layer: index of its decoder layer.
        channel: index in its FFN.
        score: high = keep.
        expert: index of its expert, or None.
    """

    layer: int
    channel: int
    score: float
    expert: int | None = None

    @property
    def name(self) -> str:
        """The channel, after its expert where it has one."""
        return str(self.channel) if self.expert is None else f"{self.expert}:{self.channel}"


@dataclass(frozen=True, slots=True)
class ChannelPath:
    """A direct path through the residual stream from one channel to one of a later layer; strength is not negative."""

    source: ChannelNode
    target: ChannelNode
    strength: float


def top_nodes(scores: Scores, per_layer: int = 6) -> dict[FFNSite, list[ChannelNode]]:
    """Return the channels with the highest scores of each layer, the best first; ties to the lower index.

    Raises:
        UsageError: ``per_layer`` is below 1, or there are no scores.
    """
    if per_layer < 1 or not scores.values:
        raise UsageError(f"per_layer must be at least 1, channels of each scored layer; got {per_layer}.")
    found: dict[FFNSite, list[ChannelNode]] = {site: [] for site in scores.values}
    for layer in sorted({site.layer for site in scores.values}):
        owners = [(site, c) for site in scores.values if site.layer == layer for c in range(site.d_ff)]
        values = torch.cat([v.double() for site, v in scores.values.items() if site.layer == layer])
        for place in torch.sort(values, descending=True, stable=True).indices[:per_layer].tolist():
            site, channel = owners[place]
            found[site].append(ChannelNode(layer, channel, float(values[place]), site.expert))
    return {site: nodes for site, nodes in found.items() if nodes}


def strongest_paths(
    model: nn.Module,
    nodes: Mapping[FFNSite, Sequence[ChannelNode]],
    stats: Mapping[FFNSite, ChannelStats] | None = None,
    n: int = 60,
) -> list[ChannelPath]:
    """Return the ``n`` strongest direct paths between channels of different layers, the strongest first.

    Memory is one row of d_model per channel, whatever the size of the model.

    Args:
        model: gives the weights; not run.
        nodes: site -> its channels (see `top_nodes`).
        stats: statistics with ``act_sq``, from which the root mean square of h is taken; without them it counts as 1.
        n: number of paths.

    Raises:
        UsageError: ``n`` is below 1, or the statistics lack ``act_sq``.
    """
    if n < 1:
        raise UsageError(f"n must be at least 1, the number of paths; got {n}.")
    written: dict[FFNSite, Tensor] = {}
    read: dict[FFNSite, list[Tensor]] = {}
    for site, own in nodes.items():
        index = torch.tensor([node.channel for node in own])
        with materialised(model, site):
            weights = weights_of(model, site)
            place = index.to(weights.down.device)
            written[site] = weights.down[:, place].T.double().cpu()
            rows = [m[place].double().cpu() for m in (weights.gate, weights.up) if m is not None]
        if stats is not None:
            written[site] *= stats[site].mean("act_sq")[index].double().cpu().sqrt()[:, None]
        read[site] = rows
    found = [path for a, b in combinations(nodes, 2) for path in _between(a, b, nodes, written, read)]
    return sorted(found, key=lambda path: -path.strength)[:n]


def _between(
    a: FFNSite,
    b: FFNSite,
    nodes: Mapping[FFNSite, Sequence[ChannelNode]],
    written: Mapping[FFNSite, Tensor],
    read: Mapping[FFNSite, Sequence[Tensor]],
) -> list[ChannelPath]:
    first, second = (a, b) if a.layer < b.layer else (b, a)
    if first.layer == second.layer or first.d_model != second.d_model:
        return []
    strength = torch.stack([(written[first] @ rows.T).abs() for rows in read[second]]).amax(0)
    return [
        ChannelPath(source, target, float(strength[i, j]))
        for i, source in enumerate(nodes[first])
        for j, target in enumerate(nodes[second])
    ]
