"""The order that obs_loss and minitron agree on, with the values of obs_loss."""

from __future__ import annotations

import torch

from ffnscope.registry import METRICS
from ffnscope.types import ChannelStats, FFNSite, FFNWeights


def given(n_tokens=400, d_ff=40, d_model=6):
    random = torch.Generator().manual_seed(0)
    h = torch.randn(n_tokens, d_ff, dtype=torch.float64, generator=random)
    h = h @ (torch.eye(d_ff) + torch.randn(d_ff, d_ff, generator=random) / 4).double()
    dy = torch.randn(n_tokens, d_model, dtype=torch.float64, generator=random)
    down = torch.randn(d_model, d_ff, dtype=torch.float64, generator=random)
    windows = h.abs().view(4, -1, d_ff).sum(1).square().sum(0) / (n_tokens / 4)
    values = {"h_outer": h.T @ h, "dy_outer": dy.T @ dy, "act_window_sq": windows}
    site = FFNSite(0, "layers.0.mlp", None, "up", "down", d_model, d_ff)
    stats = ChannelStats(site, values, dict.fromkeys(values, n_tokens), dict.fromkeys(values, "sum"))
    return stats, FFNWeights(None, torch.zeros(d_ff, d_model, dtype=torch.float64), down)


def test_the_values_are_those_of_obs_loss_in_another_order():
    stats, weights = given()
    found, loss = (METRICS.get(name).fn(stats, weights) for name in ("obs_general", "obs_loss"))
    assert torch.equal(found.sort().values, loss.sort().values)
    assert not torch.equal(found, loss)


def test_a_channel_that_both_rank_lower_goes_earlier():
    stats, weights = given()
    found, loss, steady = (METRICS.get(name).fn(stats, weights) for name in ("obs_general", "obs_loss", "minitron"))
    below = (loss[:, None] < loss) & (steady[:, None] < steady)
    assert int(below.sum()) > 300
    assert bool((found[:, None] < found)[below].all())


def test_equal_mean_ranks_go_by_obs_loss():
    stats, weights = given()
    loss = METRICS.get("obs_loss").fn(stats, weights)
    opposite = (-loss).argsort().argsort().double()  # every mean rank is the same
    values = {**stats.values, "act_window_sq": opposite * 400}
    stats = ChannelStats(stats.site, values, stats.counts, stats.reductions)
    assert torch.equal(METRICS.get("obs_general").fn(stats, weights), loss)
