"""The public formulas of LLM-Rank (arXiv:2410.13299, code at commit aaf9ec9), for comparison: parity, faults included.

They score the rows of up by the linear output W_up x. Know before you choose one:

- gate and nonlinearity are ignored: a channel whose gate is always shut counts by what up alone would give;
- no score depends on the down column, so a channel without any effect can rank high;
- scores change under up * c, down / c, which leaves the function as it is;
- the scores of an FFN sum to 1, so that a global ranking takes more from wide FFNs and knows nothing of depth;
- weighted PageRank with gamma = 0, the public default, is the activation score; on dense weights theta only weakens
  the graph;
- the public code also removes rows of down. These are residual channels, no channels of the FFN; plans leave them whole
  (`ffnscope.IsolatedFFNPipeline` with ``layerwise=True`` tells which they would be).

Not copied: order of ties by accident (here by index), the count of a global cut by floating-point ceiling (here exact),
activations that depend on the batch size (here sums over all tokens), and the failure on layers that are 0 throughout
(here their scores are 0).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ffnscope.graph import DecoderGraph
from ffnscope.metrics.scorers import (
    ActivationScorer,
    BaseScorer,
    Layer,
    ModifiedPageRankScorer,
    NormScorer,
    WandaScorer,
    WeightedPageRankScorer,
    shares_of,
)
from ffnscope.metrics.views import ROW_CHAIN_NEEDS, ROW_NEEDS, ProjectionView, chained_scores
from ffnscope.registry import metric
from ffnscope.types import ChannelStats, FFNSite, FFNWeights

LLM_RANK = "arXiv:2410.13299, public code, rows of up"


@metric("layerwise_norm", source=LLM_RANK, check=NormScorer)
def layerwise_norm(stats: ChannelStats, weights: FFNWeights, *, p: float = 1.0) -> Tensor:
    """LLM-Rank parity, blind to gate and down: p-norm of the up row, over the sum of the FFN.

    [d_ff]. Reads no activation. Changes under up * c, down / c.
    """
    none = weights.up.new_zeros(stats.site.d_model), weights.up.new_zeros(stats.site.d_ff)  # a norm reads neither
    return shares_of(NormScorer(p).apply(none[0], Layer(weights.up, *none)))


@metric("layerwise_activation", needs=ROW_NEEDS, source=LLM_RANK)
def layerwise_activation(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """LLM-Rank parity, blind to gate and down: sqrt(E[(W_up x)^2]), over the sum of the FFN.

    [d_ff]. The linear output of up; for h itself take ``write_norm``. Changes under up * c, down / c.
    """
    return _alone(ActivationScorer(), stats, weights)


@metric("layerwise_wanda", needs=("ffn_in_sq",), source=LLM_RANK)
def layerwise_wanda(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """LLM-Rank parity, blind to gate and down: sum over the up row of |W_ij| sqrt(E[x_j^2]), over the sum of the FFN.

    [d_ff]. Wanda's score of weights that feed the channel; for those that it feeds take ``wanda``. Changes under
    up * c, down / c.
    """
    size = stats.mean("ffn_in_sq").sqrt()
    return shares_of(WandaScorer().apply(size, Layer(weights.up, size, size.new_zeros(stats.site.d_ff))))


@metric(
    "layerwise_weighted_pagerank", needs=ROW_NEEDS, source=f"{LLM_RANK}; arXiv:2104.02764", check=WeightedPageRankScorer
)
def layerwise_weighted_pagerank(
    stats: ChannelStats, weights: FFNWeights, *, gamma: float = 0.9, theta: float = 0.5
) -> Tensor:
    """LLM-Rank parity, blind to gate and down: weighted PageRank through up; gamma = 0 is the activation score.

    [d_ff], with sum 1. With gamma = 0, the public default, it is ``layerwise_activation``. Looks at nothing after up:
    a channel with a down column of zeros can rank high. Changes under up * c, down / c.
    """
    return _alone(WeightedPageRankScorer(gamma, theta), stats, weights)


@metric("layerwise_modified_pagerank", needs=ROW_NEEDS, source=LLM_RANK, check=ModifiedPageRankScorer)
def layerwise_modified_pagerank(
    stats: ChannelStats, weights: FFNWeights, *, z_importance: bool = False, sparsity: float = 0.3
) -> Tensor:
    """LLM-Rank parity, blind to gate and down: sqrt(E[(W_up x)^2]) times the sum of |W_ij| p_j.

    [d_ff], over the sum of the FFN. ``sparsity`` is the share of inputs that ``z_importance`` sets to 0. Looks at
    nothing after up: a channel with a down column of zeros can rank high. Changes under up * c, down / c.
    """
    return _alone(ModifiedPageRankScorer(z_importance, sparsity), stats, weights)


@metric(
    "layerwise_weighted_pagerank_chained",
    needs=ROW_CHAIN_NEEDS,
    source=f"{LLM_RANK}; arXiv:2104.02764",
    scope="model",
    check=WeightedPageRankScorer,
)
def layerwise_weighted_pagerank_chained(
    graph: DecoderGraph, stats: Mapping[FFNSite, ChannelStats], *, gamma: float = 0.9, theta: float = 0.5
) -> dict[FFNSite, Tensor]:
    """LLM-Rank parity, blind to gate and what follows: weighted PageRank through all FFNs; gamma = 0 is the activation.

    Site -> [d_ff], with sum 1 each, through up, down, up, down, ... as one chain. With gamma = 0, the public default,
    it is ``layerwise_activation``. Rows of down are residual channels: the public code removes them too, plans do not.
    Attention and the residual skip are left out. Changes under up * c, down / c.
    """
    return chained_scores(WeightedPageRankScorer(gamma, theta), graph, stats, ProjectionView)


@metric(
    "layerwise_modified_pagerank_chained",
    needs=ROW_CHAIN_NEEDS,
    source=LLM_RANK,
    scope="model",
    check=ModifiedPageRankScorer,
)
def layerwise_modified_pagerank_chained(
    graph: DecoderGraph, stats: Mapping[FFNSite, ChannelStats], *, z_importance: bool = False, sparsity: float = 0.3
) -> dict[FFNSite, Tensor]:
    """LLM-Rank parity, blind to gate and what follows: modified PageRank through all FFNs as one chain.

    Site -> [d_ff], with sum 1 each, through up, down, up, down, ... ``sparsity`` is the share of inputs that
    ``z_importance`` sets to 0. Rows of down are residual channels: the public code removes them too, plans do not.
    Attention and the residual skip are left out. Changes under up * c, down / c.
    """
    return chained_scores(ModifiedPageRankScorer(z_importance, sparsity), graph, stats, ProjectionView)


def _alone(scorer: BaseScorer, stats: ChannelStats, weights: FFNWeights) -> Tensor:
    view = ProjectionView(stats, weights)
    return view.rank(scorer, view.start)
