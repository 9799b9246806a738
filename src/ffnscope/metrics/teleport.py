"""Where a personalised walk starts anew."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ffnscope.errors import UsageError, unknown_name
from ffnscope.graph import Branch, DecoderGraph
from ffnscope.metrics.blocks import column_sums
from ffnscope.metrics.edges import Stats
from ffnscope.metrics.sweeps import Walk
from ffnscope.types import FFNSite

Teleport = Literal["uniform", "activation", "gradient", "contrast"]
_NEEDS: dict[str, tuple[str, ...]] = {
    "uniform": (),
    "activation": ("act_sq",),
    "gradient": ("taylor_sq",),
    "contrast": ("act_sq",),
}


def teleport_statistics(params: Mapping[str, Any]) -> tuple[str, ...]:
    """Statistics that ``params["teleport"]`` needs; "activation" by default."""
    teleport = str(params.get("teleport", "activation"))
    if teleport not in _NEEDS:
        raise unknown_name("teleport", teleport, get_args(Teleport))
    return _NEEDS[teleport]


def teleport_of(
    graph: DecoderGraph, stats: Stats, damping: float, teleport: Teleport, background: Stats | None
) -> Walk:
    """A walk that starts anew as ``teleport`` says (see `graph_pagerank`), in proportion.

    Raises:
        UsageError: contrast without a background, or with one of other sites.
    """
    if teleport == "uniform":
        sizes = {branch.site: branch.up.shape[0] for branch in graph.branches}
        return Walk(damping, 1.0, lambda site: torch.ones(sizes[site], dtype=torch.float64))
    branches = {branch.site: branch for branch in graph.branches}
    if teleport == "contrast":
        _check_background(graph, background)
    known = {"activation": _activation, "gradient": _gradient, "contrast": partial(_contrast, background or {})}
    start = known[teleport]

    def nodes(site: FFNSite) -> Tensor:
        branch = branches[site]
        return start(stats, branch) if branch.is_ffn else torch.zeros(branch.up.shape[0], dtype=torch.float64)

    return Walk(damping, 0.0, nodes)


def _activation(stats: Stats, branch: Branch) -> Tensor:
    """Root of the mean square that a channel adds to the stream, over all channels of it; one read of down."""
    norms = column_sums(branch.down, 2)
    return (norms * stats[branch.site].total("act_sq") / _tokens(stats)).sqrt()


def _gradient(stats: Stats, branch: Branch) -> Tensor:
    return (stats[branch.site].total("taylor_sq") / _tokens(stats)).sqrt()


def _contrast(background: Stats, stats: Stats, branch: Branch) -> Tensor:
    here = stats[branch.site].total("act_sq") / _tokens(stats)
    there = background[branch.site].total("act_sq") / _tokens(background)
    both = here + there
    return torch.where(both > 0, (here - there) / both.clamp_min(torch.finfo(both.dtype).tiny), 0).clamp_min(0)


def _tokens(stats: Stats) -> int:
    """Tokens of the text: what an expert sees is a part of it."""
    return max(part.n_tokens for part in stats.values())


def _check_background(graph: DecoderGraph, background: Stats | None) -> None:
    if background is None:
        raise UsageError(
            "teleport 'contrast' compares two texts: calibrate on the second one for this metric, and pass its "
            "statistics as background=."
        )
    missing = [site.name for site in graph.sites if site not in background]
    if missing:
        raise UsageError(f"the background has no statistics of {missing[0]}; calibrate it with the same sites.")
