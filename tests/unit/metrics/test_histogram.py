"""The histogram of |h| and its quantile, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ffnscope.calibrate import statistics
from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.errors import UsageError
from ffnscope.metrics.histogram import BINS, bin_edges, quantile_from_counts
from ffnscope.registry import METRICS, STATISTICS
from ffnscope.types import FFNSite, FFNWeights

BIN_ERROR = 0.12  # as documented
EVERY = STATISTICS.get("act_hist").every


def act_hist(h):
    counts = torch.zeros(BINS, h.shape[1], dtype=torch.int32)
    statistics.act_hist(counts, h)
    return counts


def test_edges():
    edges = bin_edges()
    assert edges[0] == 2**-16
    assert edges[-1] == 2**16
    assert edges[64:69].tolist() == [1.0, 1.25, 1.5, 1.75, 2.0]
    assert float((edges[1:] / edges[:-1]).max()) == 1.25


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_counts_are_those_of_numpy(dtype):
    random = torch.Generator().manual_seed(0)
    h = (torch.randn(500, 3, generator=random) * torch.tensor([1e-6, 1.0, 3e3])).to(dtype)
    counts = act_hist(h)
    assert counts.shape == (BINS, 3)
    edges = np.concatenate([[0.0], bin_edges().numpy()[1:-1], [np.inf]])
    for channel in range(3):
        expected, _ = np.histogram(h[:, channel].abs().float().numpy(), edges)
        assert counts[:, channel].tolist() == expected.tolist()


def test_ends_take_the_rest():
    h = torch.tensor([[0.0], [1e-30], [-(2.0**-16)], [1.25 * 2.0**-16], [65504.0], [2.0**16], [1e30]])
    counts = act_hist(h)[:, 0]
    assert (int(counts[0]), int(counts[1]), int(counts[-1])) == (3, 1, 3)
    assert int(counts.sum()) == 7


@pytest.mark.parametrize("n", [1, 10, 999, 1000, 5000])
@pytest.mark.parametrize("quantile", [0.001, 0.5, 0.999, 1.0])
def test_quantile_is_within_the_documented_bin_error(n, quantile):
    random = torch.Generator().manual_seed(n)
    h = torch.randn(n, 6, generator=random).exp() * torch.tensor([0.01, 0.1, 1.0, 7.0, 100.0, 1e3])
    found = quantile_from_counts(act_hist(h).long(), quantile).numpy()
    expected = np.quantile(h.numpy(), quantile, axis=0, method="inverted_cdf")
    assert np.abs(found / expected - 1).max() < BIN_ERROR


def test_never_active_counts_as_zero():
    assert quantile_from_counts(act_hist(torch.zeros(9, 2)).long(), 0.999).tolist() == [0.0, 0.0]


def test_empty_histogram():
    with pytest.raises(UsageError, match="histogram is empty; calibrate on at least one token"):
        quantile_from_counts(torch.zeros(BINS, 2, dtype=torch.int64), 0.5)


def outlier_index(h):
    """``h`` [n, d_ff] as one window in which each row of h is repeated, so that the histogram reads every row once."""
    rule = METRICS.get("activation_outlier_index")
    site = FFNSite(0, "mlp", None, "up", "down", 2, h.shape[1])
    sums = Accumulator([site], rule.needed({}))
    window = h.repeat_interleave(EVERY, 0)[None]
    sums.begin(torch.ones(window.shape[:2], dtype=torch.bool), 1)
    sums.observe(site, window)
    return rule.fn(sums.result()[site], FFNWeights(None, torch.ones(h.shape[1], 2), torch.ones(2, h.shape[1])))


def test_outlier_index_against_numpy():
    random = torch.Generator().manual_seed(4)
    h = torch.randn(3000, 5, generator=random) ** torch.tensor([1.0, 1.0, 3.0, 3.0, 5.0])
    size = h.abs().numpy()
    expected = np.quantile(size, 0.999, axis=0, method="inverted_cdf") / size.mean(0)
    assert outlier_index(h).numpy() == pytest.approx(expected, rel=BIN_ERROR)


def test_outlier_index_of_a_dead_channel_is_zero():
    h = torch.stack([torch.zeros(40), torch.linspace(-1, 1, 40)], 1)
    found = outlier_index(h)
    assert found[0] == 0
    assert found[1] > 1


def test_outlier_index_sees_outliers_of_the_size_of_float16():
    h = torch.ones(2000, 1)
    h[::100] = 60000.0  # 1 %: the mean is about 601
    assert outlier_index(h).item() == pytest.approx(60000 / 600.99, rel=BIN_ERROR)
