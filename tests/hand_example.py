"""Three tokens and two channels, small enough to work every metric out by hand."""

from __future__ import annotations

from typing import Any

import torch

from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.rules import Metric
from ffnscope.types import ChannelStats, FFNSite, FFNWeights

X = torch.tensor([[4.0, 6.0], [1.0, -3.0], [-2.0, 3.0]])
H = torch.tensor([[1.0, -2.0], [3.0, 0.0], [-2.0, 6.0]])
G = torch.tensor([[0.5, 1.0], [-1.0, 2.0], [0.0, 0.0]])
DY = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
GATE = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
UP = torch.tensor([[1.0, 0.0], [6.0, 8.0]])
DOWN = torch.tensor([[5.0, -3.0], [12.0, 4.0]])
GATED = FFNWeights(GATE, UP, DOWN, torch.ones(2), torch.ones(2), torch.ones(2))
PLAIN = FFNWeights(None, UP, DOWN, None, torch.ones(2), torch.ones(2))
BEFORE = (torch.tensor([[2.0, 3.0], [0.0, 1.0]]), torch.tensor([[1.0, -2.0], [5.0, 9.0]]))  # gate and up
CORE = torch.tensor([0])
SITE = FFNSite(0, "layers.0.mlp", "gate_proj", "up_proj", "down_proj", 2, 2)


def stats_of(rule: Metric, h: torch.Tensor = H, g: torch.Tensor = G, x: torch.Tensor = X) -> ChannelStats:
    """Statistics that a metric needs, of x, h and g [3, 2] as one window with two predicted tokens."""
    sums = Accumulator([SITE], rule.needed({}), {SITE: CORE})
    sums.begin(torch.ones(1, 3, dtype=torch.bool), 2)
    sums.observe_signal(SITE, "x", x[None])
    sums.observe(SITE, h[None])
    sums.observe_signal(SITE, "dy", DY[None].to(x.dtype))
    sums.observe_gradient(SITE, h[None], g[None])
    return sums.result()[SITE]


def inputs_of(rule: Metric, weights: FFNWeights) -> dict[str, Any]:
    """What the metric gets beyond statistics and weights: in the reference, gate and up are `BEFORE`."""
    gate, up = (w.to(weights.up.dtype) for w in BEFORE)
    known = {"core": CORE, "reference": FFNWeights(None if weights.gate is None else gate, up, weights.down)}
    return {name: known[name] for name in rule.inputs}
