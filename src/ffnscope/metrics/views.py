"""One FFN as a scorer of the LLM-Rank line sees it, in the default and in the layerwise mode; and chains of FFNs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnscope.graph import Branch, DecoderGraph
from ffnscope.metrics.norms import row_norms
from ffnscope.metrics.scorers import BaseScorer, Channels, Layer, ratio, shares_of
from ffnscope.types import ChannelStats, FFNSite, FFNWeights

CHANNEL_NEEDS, CHANNEL_CHAIN_NEEDS = ("ffn_in_sq", "act_sq"), ("ffn_in_sq", "act_sq", "ffn_out_sq")
ROW_NEEDS, ROW_CHAIN_NEEDS = ("x_sum", "x_outer"), ("x_sum", "x_outer", "act_sq", "ffn_out_sq")


class ChannelView:
    """Default mode: a channel is gate row, up row and down column, and its signal is h, after the gate.

    Nothing that a scorer is given changes when up is scaled by c and down by 1/c, and a channel that is never active or
    has a down column of zeros has no edge.

    Args:
        stats: sums of one FFN: ffn_in_sq and act_sq, and ffn_out_sq to pass importance on.
        weights: its weights.
    """

    def __init__(self, stats: ChannelStats, weights: FFNWeights) -> None:
        self.stats, self.weights = stats, weights
        self._power = stats.mean("act_sq").sqrt()
        self._write = self._power * row_norms(weights.down.T).to(self._power)

    @property
    def start(self) -> Tensor:
        """Importance of the inputs when no FFN is before this one: their size, sqrt(E[x^2]) [d_model]."""
        return self.stats.mean("ffn_in_sq").sqrt()

    def rank(self, scorer: BaseScorer, previous: Tensor) -> Tensor:
        """Scores of the channels, in the scorer's own unit; [d_ff]."""
        rows = [w for w in (self.weights.gate, self.weights.up) if w is not None]
        shares = torch.stack([_row_shares(w) for w in rows]).mean(0)
        return scorer.score_channels(previous, Channels(shares, self.start, self._write, self._power, self.weights))

    def pass_on(self, scorer: BaseScorer, importance: Tensor) -> Tensor:
        """Importance of the residual channels that the FFN writes; [d_model], with sum 1 (or all 0).

        The scorer on the down projection with columns of norm 1: their length is part of ``write``.
        """
        down = self.weights.down.to(torch.promote_types(self.weights.down.dtype, torch.float32))
        unit = ratio(down, row_norms(down.T)[None].expand_as(down))
        return shares_of(scorer.apply(importance, Layer(unit, self._write, self.stats.mean("ffn_out_sq").sqrt())))


class ProjectionView:
    """Layerwise mode: the projections up and down as LLM-Rank takes them, gate and nonlinearity left out.

    A row of up is a channel by its linear output W_up x, before the gate; a row of down is a residual channel. Scores
    of either have sum 1.

    Args:
        stats: sums of one FFN: x_sum and x_outer, and act_sq and ffn_out_sq to pass importance on.
        weights: its weights.
    """

    def __init__(self, stats: ChannelStats, weights: FFNWeights) -> None:
        self.stats, self.weights = stats, weights

    @property
    def start(self) -> Tensor:
        """Importance of the inputs when no FFN is before this one: their size, sqrt(E[x^2]) [d_model]."""
        return self.stats.mean("x_outer").diagonal().sqrt()

    def rank(self, scorer: BaseScorer, previous: Tensor) -> Tensor:
        """Scores of the rows of up; [d_ff], with sum 1 (or all 0)."""
        return shares_of(scorer.apply(previous, Layer(self.weights.up, self.start, self._linear_output())))

    def pass_on(self, scorer: BaseScorer, importance: Tensor) -> Tensor:
        """Scores of the rows of down, which are residual channels; [d_model], with sum 1 (or all 0)."""
        sizes = (self.stats.mean(name).sqrt() for name in ("act_sq", "ffn_out_sq"))
        return shares_of(scorer.apply(importance, Layer(self.weights.down, *sizes)))

    def _linear_output(self) -> Tensor:
        """sqrt(E[(W_up x + b)^2]) [d_ff], from the moments of x."""
        mean, second = self.stats.mean("x_sum"), self.stats.mean("x_outer")
        up = self.weights.up.to(second)
        power = ((up @ second) * up).sum(1)
        if self.weights.up_bias is not None:
            bias = self.weights.up_bias.to(second)
            power = power + 2 * bias * (up @ mean) + bias.square()
        return power.clamp_min(0).sqrt()


View = ChannelView | ProjectionView
Open = Callable[[FFNSite], AbstractContextManager[View]]


@dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """What a chain found for one FFN: scores of its channels [d_ff], and of what it writes [d_model], if asked for."""

    channels: Tensor
    residual: Tensor | None


def rank_chain(
    scorer: BaseScorer,
    steps: Sequence[Sequence[FFNSite]],
    open_view: Open,
    n_tokens: Mapping[FFNSite, int],
    *,
    last: bool = False,
) -> dict[FFNSite, Ranked]:
    """Score FFNs of which each step feeds the next one, as if nothing were between them and no skip beside them.

    The FFNs of one step (the experts of a layer) read the same importance; what they pass on is averaged by the tokens
    that each had. An FFN without tokens is left out.

    Args:
        scorer: what scores; `BaseScorer.begin` is for the caller.
        steps: FFNs in the order of the model.
        open_view: gives the view of one FFN, within a context.
        n_tokens: calibration tokens of every FFN.
        last: also score what the last step writes.
    """
    found: dict[FFNSite, Ranked] = {}
    previous: Tensor | None = None
    for i, step in enumerate(steps):
        sites = [site for site in step if n_tokens[site]]
        for site in sites:
            with open_view(site) as view:
                scores = view.rank(scorer, view.start if previous is None else previous)
                passes = last or i < len(steps) - 1
                found[site] = Ranked(scores, view.pass_on(scorer, scores) if passes else None)
        votes = [n_tokens[s] * r for s in sites if (r := found[s].residual) is not None]
        previous = torch.stack(votes).sum(0) if votes else previous
    return found


def chained_scores(
    scorer: BaseScorer,
    graph: DecoderGraph,
    stats: Mapping[FFNSite, ChannelStats],
    view: type[ChannelView] | type[ProjectionView],
    *,
    isolated: bool = False,
) -> dict[FFNSite, Tensor]:
    """Scores of all FFNs of a graph, as one chain or each for itself: site -> [d_ff].

    An expert that no token reached has zeros.
    """
    branches = {branch.site: branch for branch in graph.branches if branch.site in graph.sites}

    @contextmanager
    def opened(site: FFNSite) -> Generator[View]:
        with _weights(branches[site]) as weights:
            yield view(stats[site], weights)

    steps = ffn_steps(graph)
    n_tokens = {site: stats[site].n_tokens for site in branches}
    found: dict[FFNSite, Ranked] = {}
    for chain in [[[site]] for step in steps for site in step] if isolated else [steps]:
        found |= rank_chain(scorer, chain, opened, n_tokens)
    unreached = {site: torch.zeros(site.d_ff, dtype=torch.float64) for site in branches if site not in found}
    return {site: unreached[site] if site in unreached else found[site].channels for site in branches}


def ffn_steps(graph: DecoderGraph) -> list[list[FFNSite]]:
    """FFNs of a graph in the order of the model; those of one step are beside each other."""
    ffns = set(graph.sites)
    steps = [[branch.site for branch in step if branch.site in ffns] for step in graph.steps]
    return [step for step in steps if step]


@contextmanager
def _weights(branch: Branch) -> Generator[FFNWeights]:
    """All matrices of one branch, within a context."""
    with ExitStack() as stack:
        gate = None if branch.gate is None else stack.enter_context(branch.gate.read())
        up, down = (stack.enter_context(matrix.read()) for matrix in (branch.up, branch.down))
        yield FFNWeights(gate, up, down, up_bias=branch.up.bias())


def _row_shares(weight: Tensor) -> Tensor:
    """|W| over the sum of its row; [n_out, n_in], at least float32."""
    sizes = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
    return ratio(sizes, sizes.sum(1, keepdim=True))
