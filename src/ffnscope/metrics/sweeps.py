"""Sweeps over the decoder graph, one step at a time: each is exact, because the graph has no cycle.

Every function takes the value of one cut to the next, and tells the values of the nodes between. Vectors are float64 on
the CPU, and only those of one step are held. Divisions by zero give zero: what has no edge to go on ends there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ffnscope.metrics.blocks import product, row_blocks
from ffnscope.metrics.edges import BranchEdges, StepEdges
from ffnscope.types import FFNSite

Nodes = dict[FFNSite, Tensor]
Given = Callable[[FFNSite], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Walk:
    """What a sweep adds and takes away: each edge multiplies by ``damping``; each node adds its ``teleport``.

    Attributes:
        damping: 1 for influence.
        cut: what a residual channel adds, [d_model] or a number.
        nodes: what the nodes of a branch add, [n_nodes]; None: nothing.
    """

    damping: float = 1.0
    cut: Tensor | float = 0.0
    nodes: Given | None = None

    def at(self, edges: BranchEdges, arrived: Tensor) -> Tensor:
        """Value of the nodes of a branch from what arrived there."""
        found = self.damping * arrived
        return found if self.nodes is None else found + self.nodes(edges.branch.site)


INFLUENCE = Walk()


def backward(step: StepEdges, after: Tensor, walk: Walk = INFLUENCE) -> tuple[Tensor, Nodes]:
    """Take the value of the cut after a step to the cut before it; each target shares its value among its sources.

    Shares are proportional to strength, so they sum to 1: the value of a cut is conserved. A channel gives half of its
    value through gate and half through up. One read of each matrix, two of down in a step of several branches.

    Returns:
        The cut before [d_model], and the value of the nodes of each branch.
    """
    total, arrived = _arrived(step, after)
    before = step.skip * _divided(after, total)
    found: Nodes = {}
    for edges in step.branches:
        nodes = walk.at(edges, edges.merged(arrived[edges.branch.site]))
        found[edges.branch.site] = nodes
        before = before + _shared_back(edges, nodes)
    return walk.damping * before + walk.cut, found


def resolved(step: StepEdges) -> StepEdges:
    """The step with ``incoming`` known for its balanced branches: one read of down."""
    known = (_balanced(e, e.write * _down_columns(e, e.into)) if e.balanced else e for e in step.branches)
    return replace(step, branches=tuple(known))


def forward(step: StepEdges, before: Tensor, walk: Walk = INFLUENCE) -> tuple[Tensor, Nodes]:
    """Take the value of the cut before a step to the cut after it; each source shares its value among its targets.

    Shares are proportional to strength. Two reads of each matrix.
    """
    written = {e.branch.site: e.write * _down_columns(e, e.into) for e in step.branches}
    branches = [_balanced(e, written[e.branch.site]) if e.balanced else e for e in step.branches]
    out = step.skip + sum(_read_sums(edges) for edges in branches)
    shares = _divided(before, out)
    after = step.skip * shares
    found: Nodes = {}
    for edges in branches:
        site = edges.branch.site
        found[site] = nodes = walk.at(edges, _read(edges, shares))
        share = edges.spread(_divided(nodes, edges.merged(written[site])))
        after = after + edges.into * _down_rows(edges, edges.write * share)
    return walk.damping * after + walk.cut, found


def expected(step: StepEdges, after: Tensor) -> tuple[Tensor, Nodes]:
    """Value of the cut after a step that a walk of `forward` can expect from each node: the adjoint of `forward`.

    One read of each matrix.
    """
    before, out = step.skip * after, step.skip.clone()
    found: Nodes = {}
    for edges in step.branches:
        written, reached = _written(edges, after)
        found[edges.branch.site] = nodes = _divided(edges.merged(reached), edges.merged(written))
        known = _balanced(edges, written) if edges.balanced else edges
        read = _read_columns(known, torch.stack([torch.ones_like(nodes), nodes], 1)) * edges.read[:, None]
        out, before = out + read[:, 0], before + read[:, 1]
    return _divided(before, out), found


def path_sums(step: StepEdges, after: Tensor, walk: Walk, *, added: float) -> tuple[Tensor, Nodes]:
    """Take the sum of strengths over all paths that leave each node from the cut after a step to the one before.

    Nothing is shared. Each node counts for ``added`` in the sums of others, which is not in what is told. One read.
    """
    before = step.skip * after
    found: Nodes = {}
    for edges in step.branches:
        written, reached = _written(edges, after)
        known = _balanced(edges, written) if edges.balanced else edges
        found[edges.branch.site] = nodes = walk.damping * edges.merged(reached)
        before = before + edges.read * _read_columns(known, nodes + added)
    return walk.damping * before + walk.cut, found


def ahead(step: StepEdges, cut: Tensor, nodes: Nodes) -> tuple[Tensor, Nodes]:
    """What one edge leads to, from the cut before a `resolved` step and its nodes: the cut after, and the nodes."""
    after = step.skip * cut
    found: Nodes = {}
    for edges in step.branches:
        site = edges.branch.site
        found[site] = _read(edges, cut)
        after = after + edges.into * _down_rows(edges, edges.write * edges.spread(nodes[site]))
    return after, found


def back(step: StepEdges, cut: Tensor, nodes: Nodes) -> tuple[Tensor, Nodes]:
    """The adjoint of `ahead`: from the cut after a step and its nodes to the cut before, and the nodes."""
    before = step.skip * cut
    found: Nodes = {}
    for edges in step.branches:
        site = edges.branch.site
        found[site] = edges.merged(edges.write * _down_columns(edges, edges.into * cut))
        before = before + edges.read * _read_columns(edges, nodes[site])
    return before, found


def largest_incoming(step: StepEdges) -> float:
    """Largest sum of the strengths of the edges into one node. Two reads of down, one of the others."""
    total, largest = step.skip.clone(), 0.0
    for edges in resolved(step).branches:
        total += edges.into * _down_rows(edges, edges.write)
        known = edges.incoming
        into_nodes = _read(edges, torch.ones_like(total)) if known is None else known
        largest = max(largest, float(into_nodes.max()))
    return max(largest, float(total.max()))


def _balanced(edges: BranchEdges, written: Tensor) -> BranchEdges:
    """Edges whose nodes read as much as they write, ``written`` [d_ff]."""
    return replace(edges, incoming=edges.merged(written))


def _written(edges: BranchEdges, after: Tensor) -> tuple[Tensor, Tensor]:
    """What each channel writes in all, and to the value of the cut after; [d_ff] each. One read."""
    columns = _down_columns(edges, torch.stack([edges.into, edges.into * after], 1)) * edges.write[:, None]
    return columns[:, 0], columns[:, 1]


def _arrived(step: StepEdges, after: Tensor) -> tuple[Tensor, Nodes]:
    """Strength into each residual channel of the cut after [d_model], and the share of each channel in its value."""
    total = step.skip.clone()
    alone = len(step.branches) == 1
    for edges in step.branches if not alone else ():
        total += edges.into * _down_rows(edges, edges.write)
    found: Nodes = {}
    for edges in step.branches:
        arrived = torch.zeros(edges.branch.site.d_ff, dtype=torch.float64)
        with edges.branch.down.read() as weight:
            for rows, block in row_blocks(weight, edges.power):
                if alone:
                    total[rows] += edges.into[rows] * product(block, edges.write)
                arrived += product(block.T, edges.into[rows] * _divided(after[rows], total[rows]))
        found[edges.branch.site] = edges.write * arrived
    return total, found


def _shared_back(edges: BranchEdges, nodes: Tensor) -> Tensor:
    """Give the value of nodes to the residual channels that they read, [d_model]."""
    readers = edges.branch.readers
    found = torch.zeros_like(edges.read)
    for matrix in readers:
        with matrix.read() as weight:
            for rows, block in row_blocks(weight, edges.power):
                share = _divided(nodes[rows] / len(readers), product(block, edges.read))
                found += product(block.T, share)
    return found * edges.read


def _factors(edges: BranchEdges, rows: slice, block: Tensor) -> Tensor | float:
    """What the reading edges of some rows are multiplied by so that they sum up to ``incoming``."""
    if edges.incoming is None:
        return 1.0
    return _divided(edges.incoming[rows] / len(edges.branch.readers), product(block, edges.read))


def _read_sums(edges: BranchEdges) -> Tensor:
    """Strength of all reading edges out of each residual channel, [d_model]."""
    return edges.read * _read_columns(edges, torch.ones(edges.n_nodes, dtype=torch.float64))


def _read_columns(edges: BranchEdges, nodes: Tensor) -> Tensor:
    """Sum over nodes of their reading weights times a value (or several columns of values) of each; [d_model, ...]."""
    found = torch.zeros(len(edges.read), *nodes.shape[1:], dtype=torch.float64)
    for matrix in edges.branch.readers:
        with matrix.read() as weight:
            for rows, block in row_blocks(weight, edges.power):
                factor = _factors(edges, rows, block)
                if isinstance(factor, Tensor) and nodes.dim() > 1:
                    factor = factor[:, None]
                found += product(block.T, nodes[rows] * factor)
    return found


def _read(edges: BranchEdges, values: Tensor) -> Tensor:
    """Sum over the reading edges of each node of strength times the value of the residual channel, [n_nodes]."""
    found = torch.zeros(edges.n_nodes, dtype=torch.float64)
    for matrix in edges.branch.readers:
        with matrix.read() as weight:
            for rows, block in row_blocks(weight, edges.power):
                found[rows] += product(block, edges.read * values) * _factors(edges, rows, block)
    return found


def _down_rows(edges: BranchEdges, values: Tensor) -> Tensor:
    """|down|^power @ values, [d_model]."""
    found = torch.zeros_like(edges.into)
    with edges.branch.down.read() as weight:
        for rows, block in row_blocks(weight, edges.power):
            found[rows] = product(block, values)
    return found


def _down_columns(edges: BranchEdges, values: Tensor) -> Tensor:
    """Transpose of |down|^power times values [d_model, ...]; [d_ff, ...]."""
    found = torch.zeros(len(edges.write), *values.shape[1:], dtype=torch.float64)
    with edges.branch.down.read() as weight:
        for rows, block in row_blocks(weight, edges.power):
            found += product(block.T, values[rows])
    return found


def _divided(value: Tensor, by: Tensor) -> Tensor:
    """value / by, 0 where ``by`` is 0."""
    return torch.where(by > 0, value / by.clamp_min(torch.finfo(by.dtype).tiny), 0)
