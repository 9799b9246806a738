"""Scorers of the LLM-Rank line (arXiv:2410.13299) on channels: gate row, up row and down column, by the gated signal h.

All of them read the FFN in the direction of the forward, and none looks further downstream than its own down
projection. What they measure does not change when up is scaled by c and down by 1/c, and is 0 for a channel that is
never active or has a down column of zeros. The public formulas, faults included, are in `ffnscope.metrics.layerwise`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ffnscope.graph import DecoderGraph
from ffnscope.metrics.scorers import ActivationScorer, BaseScorer, ModifiedPageRankScorer, WeightedPageRankScorer
from ffnscope.metrics.views import CHANNEL_CHAIN_NEEDS, CHANNEL_NEEDS, ChannelView, chained_scores
from ffnscope.registry import metric
from ffnscope.types import ChannelStats, FFNSite, FFNWeights

LLM_RANK = "arXiv:2410.13299, on channels and h"


@metric("write_norm", needs=CHANNEL_NEEDS, source=f"{LLM_RANK} (activation score)")
def write_norm(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """Size of what a channel writes, sqrt(E[h^2]) times the L2 norm of its down column.

    [d_ff]. The root mean square length of the channel's part of the FFN output. Invariant under up * c, down / c.
    """
    return _alone(ActivationScorer(), stats, weights)


@metric("weighted_pagerank", needs=CHANNEL_NEEDS, source=f"{LLM_RANK}; arXiv:2104.02764", check=WeightedPageRankScorer)
def weighted_pagerank(stats: ChannelStats, weights: FFNWeights, *, gamma: float = 0.9, theta: float = 0.5) -> Tensor:
    """One step of weighted PageRank from the FFN's input to its channels, times what all of them write.

    [d_ff]. gamma P p + (1 - gamma) w / sum(w), times sum(w), with w = ``write_norm`` and p = sqrt(E[x^2]) over its sum.
    The edge from input d to channel n is w_n times the share that d has in |gate row| and |up row| of n (their mean);
    P mixes these strengths (theta) with their mere existence (1 - theta), each divided by its sum over channels.
    ``gamma`` in [0, 1] is the weight of the graph: with 0 it is ``write_norm``. Invariant under up * c, down / c.
    """
    return _alone(WeightedPageRankScorer(gamma, theta), stats, weights)


@metric(
    "modified_pagerank", needs=CHANNEL_NEEDS, source=f"{LLM_RANK} (modified PageRank)", check=ModifiedPageRankScorer
)
def modified_pagerank(
    stats: ChannelStats, weights: FFNWeights, *, z_importance: bool = False, sparsity: float = 0.3
) -> Tensor:
    """What a channel writes times the importance of what it reads.

    [d_ff]. ``write_norm`` times the mean of p = sqrt(E[x^2]) over its sum, weighted by the share that each input has in
    |gate row| and |up row|. With ``z_importance`` the least important ``sparsity`` of the inputs counts as 0. Invariant
    under up * c, down / c.
    """
    return _alone(ModifiedPageRankScorer(z_importance, sparsity), stats, weights)


@metric(
    "weighted_pagerank_chained",
    needs=CHANNEL_CHAIN_NEEDS,
    source=f"{LLM_RANK}; arXiv:2104.02764",
    scope="model",
    check=WeightedPageRankScorer,
)
def weighted_pagerank_chained(
    graph: DecoderGraph, stats: Mapping[FFNSite, ChannelStats], *, gamma: float = 0.9, theta: float = 0.5
) -> dict[FFNSite, Tensor]:
    """Weighted PageRank, FFN after FFN: p is what the FFN before gives to the residual channels.

    Site -> [d_ff]. ``weighted_pagerank`` with p from the same step through the down projection of the FFN before (its
    columns with norm 1, teleport sqrt(E[y^2])); experts of a layer give their mean, weighted by tokens. Attention and
    the residual skip are left out. Invariant under up * c, down / c.
    """
    return chained_scores(WeightedPageRankScorer(gamma, theta), graph, stats, ChannelView)


@metric(
    "modified_pagerank_chained",
    needs=CHANNEL_CHAIN_NEEDS,
    source=f"{LLM_RANK} (modified PageRank)",
    scope="model",
    check=ModifiedPageRankScorer,
)
def modified_pagerank_chained(
    graph: DecoderGraph, stats: Mapping[FFNSite, ChannelStats], *, z_importance: bool = False, sparsity: float = 0.3
) -> dict[FFNSite, Tensor]:
    """Modified PageRank, FFN after FFN: p is what the FFN before gives to the residual channels.

    Site -> [d_ff]. ``modified_pagerank`` with p = sqrt(E[y^2]) times the sum of |down|, its columns with norm 1, over
    the channels of the FFN before, weighted by their importance. Attention and the residual skip are left out.
    Invariant under up * c, down / c.
    """
    return chained_scores(ModifiedPageRankScorer(z_importance, sparsity), graph, stats, ChannelView)


def _alone(scorer: BaseScorer, stats: ChannelStats, weights: FFNWeights) -> Tensor:
    view = ChannelView(stats, weights)
    return view.rank(scorer, view.start)
