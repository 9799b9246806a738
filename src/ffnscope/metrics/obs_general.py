"""A removal order that also holds on other text than the calibration's."""

from __future__ import annotations

import torch
from torch import Tensor

from ffnscope.metrics.activation import minitron
from ffnscope.metrics.obs import obs_loss
from ffnscope.metrics.ranks import average_ranks
from ffnscope.registry import metric
from ffnscope.types import ChannelStats, FFNWeights


@metric(
    "obs_general",
    needs=("h_outer", "dy_outer", "act_window_sq"),
    source="mean of the ranks of obs_loss and of Minitron's score (arXiv:2407.14679), ours",
)
def obs_general(stats: ChannelStats, weights: FFNWeights) -> Tensor:
    """``obs_loss`` in the order of the mean rank of ``obs_loss`` and ``minitron``; [d_ff], a removal order.

    ``obs_loss`` removes what the other channels predict, and what has no effect, on the calibration text; on text of
    another domain both can be wrong. ``minitron`` keeps channels that are active in most windows, whatever they do.
    A channel goes early when both say so. Equal mean ranks go by ``obs_loss``. Values are those of ``obs_loss``, lowest
    first in the new order, so that FFNs are compared in its units (nats per token), and their widths under ``global``
    and ``halfway`` are those of ``obs_loss``. Changes under up * c, down / c.
    """
    loss = obs_loss(stats, weights)
    place = average_ranks(loss)
    both = place + average_ranks(minitron(stats, weights)).to(place)
    by_loss = loss.argsort()
    order = by_loss[both[by_loss].argsort(stable=True)]
    return torch.empty_like(loss).index_copy_(0, order, loss.sort().values)
