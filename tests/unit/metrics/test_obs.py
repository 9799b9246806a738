"""Greedy OBS: one nested order, exact increments, copies, dead channels, panels."""

from __future__ import annotations

import pytest
import torch

from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.registry import METRICS
from ffnscope.types import ChannelStats, FFNSite, FFNWeights


def make(d_ff=150, d_model=7, n_tokens=600, seed=0):
    random = torch.Generator().manual_seed(seed)
    h = torch.randn(n_tokens, d_ff, dtype=torch.float64, generator=random)
    h = h @ (torch.eye(d_ff) + torch.randn(d_ff, d_ff, generator=random) / d_ff**0.5).double()
    return h, torch.randn(d_model, d_ff, dtype=torch.float64, generator=random)


def score(h, down, name="obs", dy=None, **params):
    site = FFNSite(0, "layers.0.mlp", None, "up", "down", *down.shape)
    values, counts = {"h_outer": h.T @ h}, {"h_outer": len(h)}
    if dy is not None:
        values, counts = {**values, "dy_outer": dy.T @ dy}, {**counts, "dy_outer": len(dy)}
    stats = ChannelStats(site, values, counts, dict.fromkeys(values, "sum"))
    weights = FFNWeights(None, torch.zeros(down.shape[1], down.shape[0], dtype=down.dtype), down)
    return METRICS.get(name).fn(stats, weights, **params)


def refit_error(h, down, kept, damping=0.01):
    """Least squares with the same damping, by numpy's solver in torch."""
    ridge = (damping * h.square().mean()).sqrt() * torch.eye(h.shape[1], dtype=h.dtype)
    root = torch.cat([h / len(h) ** 0.5, ridge])
    target = root @ down.T
    if not len(kept):
        return float(target.square().sum())
    return float((target - root[:, kept] @ torch.linalg.lstsq(root[:, kept], target).solution).square().sum())


def test_sums_along_the_order_are_refit_errors_beyond_one_panel():
    METRICS.names()  # all metrics are registered, in their order
    from ffnscope.metrics.obs import removal_order

    h, down = make()
    damped = h.T @ h / len(h)
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    order, increases = removal_order(torch.linalg.inv(damped), down.T @ down)
    assert sorted(order.tolist()) == list(range(150))
    for removed in (1, 63, 64, 65, 128, 149, 150):
        wanted = refit_error(h, down, order[removed:])
        assert sum(increases[:removed]) == pytest.approx(wanted, rel=1e-9)
    found = score(h, down)
    assert torch.equal(torch.argsort(found), order)
    raised = torch.tensor(increases, dtype=torch.float64).cummax(0).values
    torch.testing.assert_close(found[order], raised, rtol=1e-12, atol=0)
    assert bool((found[order].diff() > 0).all())


def test_the_first_score_is_that_of_sparsegpt():
    h, down = make(d_ff=30)
    found, single = score(h, down), score(h, down, "sparsegpt")
    first = int(found.argmin())
    assert first == int(single.argmin())
    assert float(found[first]) == pytest.approx(float(single[first]), rel=1e-9)


def test_order_of_channels_does_not_matter():
    h, down = make()
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(score(h[:, order], down[:, order]), score(h, down)[order], rtol=1e-8, atol=0)


def test_a_gradient_without_direction_weighs_nothing():
    h, down = make(d_ff=80)
    dy = torch.eye(7, dtype=torch.float64) * 7**0.5  # E[dy dy^T] = I
    torch.testing.assert_close(2 * score(h, down, "obs_loss", dy), score(h, down), rtol=1e-9, atol=0)


def test_outputs_that_the_loss_does_not_see_are_free():
    h, down = make(d_ff=12)
    down[:, :6], down[0, 6:] = 0, 0
    down[0, :6] = 100.0  # these channels write to output 0 only
    dy = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    dy[:, 0] = 0
    order = torch.argsort(score(h, down, "obs_loss", dy))
    assert set(order[:6].tolist()) == set(range(6))
    assert set(torch.argsort(score(h, down))[:6].tolist()) == set(range(6, 12))


def test_dead_channels_go_first():
    h, down = make(d_ff=100)
    h[:, [3, 50, 99]] = 0
    down[:, 3] *= 1e6
    found = score(h, down)
    order = torch.argsort(found)
    assert order[:3].tolist() == [3, 50, 99]
    assert float(found[50]) < 1e-300 and float(found[order[3]]) > 1e-6
    alive = torch.tensor([j for j in range(100) if j not in (3, 50, 99)])
    # the mean power counts dead channels
    torch.testing.assert_close(found[alive], score(h[:, alive], down[:, alive], damping=0.0097), rtol=1e-8, atol=0)


def test_an_ffn_that_is_never_active():
    found = score(torch.zeros(9, 5, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64))
    assert torch.argsort(found).tolist() == [0, 1, 2, 3, 4] and float(found.max()) < 1e-300


def test_one_of_two_copies_is_free_and_the_other_is_not():
    h, down = make(d_ff=20)
    h[:, 7] = h[:, 4]
    found = score(h, down, damping=1e-6)
    first, second = sorted((float(found[4]), float(found[7])))
    assert first < 1e-4 and second > 0.1
    assert int(found.argmin()) in (4, 7)


def test_arguments_are_left_alone():
    h, down = make(d_ff=70)
    before = down.clone()
    assert torch.equal(score(h, down), score(h, down))
    assert torch.equal(down, before)


@pytest.mark.parametrize("name", ["obs", "obs_loss"])
@pytest.mark.parametrize("damping", [0.0, -0.01, float("nan"), float("inf")])
def test_damping_out_of_range(name, damping):
    text = f"damping must be positive, a share of the mean power of the channels; got {damping:g}"
    with pytest.raises(UsageError, match=text):
        METRICS.get(name).needed({"damping": damping})
    with pytest.raises(UsageError, match=text):
        score(*make(d_ff=3), name, torch.ones(2, 7, dtype=torch.float64), damping=damping)


def test_what_cannot_be_inverted_or_is_not_finite():
    h, down = make(d_ff=30, n_tokens=2)
    with pytest.raises(UsageError, match=r"layers.0.mlp: the second moment.*raise damping above 1e-30"):
        score(h, down, damping=1e-30)
    down[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers.0.mlp: the second moment or the weights of down"):
        score(h, down)
