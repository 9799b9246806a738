"""Three tokens and two channels, small enough to work every metric out by hand."""

from __future__ import annotations

import torch

from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.registry import Metric
from ffnscope.types import ChannelStats, FFNSite, FFNWeights

H = torch.tensor([[1.0, -2.0], [3.0, 0.0], [-2.0, 6.0]])
G = torch.tensor([[0.5, 1.0], [-1.0, 2.0], [0.0, 0.0]])
GATE = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
UP = torch.tensor([[1.0, 0.0], [6.0, 8.0]])
DOWN = torch.tensor([[5.0, -3.0], [12.0, 4.0]])
GATED = FFNWeights(GATE, UP, DOWN, torch.ones(2), torch.ones(2), torch.ones(2))
PLAIN = FFNWeights(None, UP, DOWN, None, torch.ones(2), torch.ones(2))
SITE = FFNSite(0, "layers.0.mlp", "gate_proj", "up_proj", "down_proj", 2, 2)


def stats_of(rule: Metric, h: torch.Tensor = H, g: torch.Tensor = G) -> ChannelStats:
    """Statistics that a metric needs, of h and g [3, 2] as one window with two predicted tokens."""
    sums = Accumulator([SITE], rule.needed({}))
    sums.begin(torch.ones(1, 3, dtype=torch.bool), 2)
    sums.observe(SITE, h[None])
    sums.observe_gradient(SITE, h[None], g[None])
    return sums.result()[SITE]
