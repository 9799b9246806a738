"""Memory of sums, and sums that statistics add to themselves."""

from __future__ import annotations

import pytest
import torch

from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.errors import DeviceError, UsageError
from ffnscope.registry import STATISTICS
from ffnscope.rules import Statistic
from ffnscope.types import FFNSite

SITE = FFNSite(0, "layers.0.mlp", None, "up", "down", 2, 3)
HUGE = FFNSite(0, "layers.0.mlp", None, "up", "down", 2, 2**23)  # 512 TiB per matrix: no address space has them


def observed(site, names, h, core=None):
    sums = Accumulator([site], names, core)
    sums.begin(torch.ones(h.shape[:2], dtype=torch.bool), h.shape[1] - 1)
    sums.observe(site, h)
    return sums


def test_sums_without_memory_name_the_statistic_and_who_needs_it():
    text = (
        r"out of memory for the sums of the calibration pass, [\d,]+ MiB for 1 FFNs: statistic 'h_outer' alone takes "
        r"536,870,912 MiB. Leave out the metrics that need it \(average_redundancy, pairwise_redundancy_gaussian, "
        r"sparsegpt, obs, obs_loss, obs_general\), or calibrate fewer FFNs \(model.tracked_layers, --tracked\)\."
    )
    with pytest.raises(DeviceError, match=text):
        observed(HUGE, ["act_sq", "h_outer"], torch.zeros(1, 2, 2**23))


def test_the_error_of_a_batch_does_not_hide_it(monkeypatch):
    """A batch names the batch size: nothing that would help against sums."""
    from ffnscope.calibrate import sums
    from ffnscope.calibrate.collect import calibrate
    from reference import text
    from tiny import tiny

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, windows = tiny("llama"), text(1)
    monkeypatch.setattr(sums.torch, "empty", full)
    asked = r"for the sums of the calibration pass, .* statistic 'act_sq' alone"
    with pytest.raises(DeviceError, match=asked) as caught:
        calibrate(model, windows, ["wanda"])
    assert "batch_size" not in str(caught.value)


def test_a_statistic_that_adds_in_place(monkeypatch):
    item = Statistic("mine", lambda total, h: total.add_(h.sum(0)), ("h",), "sum", ("d_ff",), 1, "Mine.", in_place=True)
    monkeypatch.setitem(STATISTICS._items, "mine", item)
    h = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    sums = observed(SITE, ["mine", "act_sum"], h)
    sums.observe(SITE, h)
    part = sums.result()[SITE]
    assert part.total("mine").dtype == torch.float64
    assert torch.allclose(part.total("mine"), part.total("act_sum"), rtol=1e-6)
    assert part.counts["mine"] == part.counts["act_sum"] == 24
    bad = h.clone()
    bad[0, 0, 0] = float("nan")
    assert observed(SITE, ["mine"], bad).first_not_finite(matrices=False) == SITE


def test_in_place_means_sum():
    with pytest.raises(UsageError, match="'mine' adds in place, so parts are summed; got reduce='max'"):
        Statistic("mine", lambda total, h: None, ("h",), "max", ("d_ff",), 1, "Mine.", in_place=True)


def test_products_that_overflow_show_when_matrices_are_looked_at():
    h = torch.full((1, 2, 3), 1e20)
    sums = observed(SITE, ["h_outer"], h)
    assert sums.first_not_finite(matrices=False) is None
    assert sums.first_not_finite() == SITE


@pytest.mark.parametrize("name", ["h_outer", "x_outer", "dy_outer", "xh_outer", "taylor_core"])
@pytest.mark.parametrize("width", [1, 3, 255, 256, 257, 600])
def test_blocks_of_every_width(name, width):
    """Second moments are added block by block; the last block is narrower."""
    random = torch.Generator().manual_seed(width)
    x, h, g = (torch.randn(7, n, generator=random, dtype=torch.float64) for n in (2 * width, width, width))
    q, item = h * g, STATISTICS.get(name)
    signals, expected = {
        "h_outer": ((h,), h.T @ h),
        "x_outer": ((x,), x.T @ x),
        "dy_outer": ((x,), x.T @ x),
        "xh_outer": ((x, h), x.T @ h),
        "taylor_core": ((h, g, torch.arange(width)), q.T @ q),
    }[name]
    total = torch.ones(expected.shape, dtype=torch.float64)
    item.fn(total, *signals)
    assert torch.allclose(total, 1 + expected, rtol=1e-12, atol=1e-12)
    some = torch.tensor([width - 1])
    if name == "taylor_core":
        part = torch.zeros(1, width, dtype=torch.float64)
        item.fn(part, h, g, some)
        assert torch.allclose(part, expected[some], rtol=1e-12, atol=1e-12)
