"""The jackknife by hand, its groups, and how often its intervals cover."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffnscope.analyze.agreement import jaccard, spearman
from ffnscope.analyze.jackknife import (
    GROUPS,
    LeftOut,
    document_groups,
    jackknife_interval,
    jackknife_variance,
    one_sample_interval,
)
from ffnscope.calibrate.windows import Windows, contiguous_windows
from ffnscope.errors import UsageError
from reference import padded
from tiny import tokens

# --- one text ---


def test_interval_of_one_text_is_the_mean_plus_minus_t_times_its_standard_error() -> None:
    """For a mean and groups of one, the jackknife variance is the usual squared standard error."""
    values = torch.tensor([1.0, 2.0, 4.0, 7.0])
    mean, error = float(values.mean()), float(values.std()) / 2
    left = LeftOut([float((values.sum() - v) / 3) for v in values], [0.25] * 4)
    low, high = one_sample_interval(mean, left, (-100.0, 100.0))
    assert (low, high) == pytest.approx((mean - 3.18245 * error, mean + 3.18245 * error), rel=1e-5)
    assert one_sample_interval(mean, left, (0.0, 4.0)) == (0.0, 4.0)
    assert one_sample_interval(2.0, LeftOut([2.0, 2.0], [0.5, 0.5]), (0.0, 4.0)) == (2.0, 2.0)


# --- groups ---


def text(document: list[int]) -> Windows:
    return contiguous_windows(tokens(len(document), 8), "random tokens", torch.tensor(document))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=40), st.integers(2, 10), st.integers(0, 5))
def test_groups_hold_whole_documents_and_every_window_once(document: list[int], groups: int, seed: int) -> None:
    windows = text(document)
    masks = document_groups(windows, groups, seed)
    assert len(masks) == min(groups, len(set(document)))
    assert torch.stack(masks).sum(0).tolist() == [1] * len(document)
    assert all(bool(mask.any()) for mask in masks)
    owners = [set(windows.document[mask].tolist()) for mask in masks]
    assert sum(map(len, owners)) == len(set(document))


def test_groups_are_balanced_by_tokens() -> None:
    windows = padded([8, 8, 16, 8, 8], 16)
    sizes = [windows[mask].n_tokens for mask in document_groups(windows, 3)]
    assert sizes == [16, 16, 16]


def test_groups_are_of_random_documents_but_always_the_same() -> None:
    windows = text(list(range(40)))
    first, again, other = (document_groups(windows, 4, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    neighbours = sum(int((mask[1:] & mask[:-1]).sum()) for mask in first)
    assert 1 <= neighbours <= 20  # neither blocks (36) nor every fourth document (0)
    assert [int(mask.sum()) for mask in first] == [10] * 4


def test_one_document_is_one_group() -> None:
    (mask,) = document_groups(text([7, 7, 7]))
    assert mask.all()


def test_a_single_group_is_refused() -> None:
    with pytest.raises(UsageError, match=r"groups must be at least 2, .* got 1"):
        document_groups(text([1, 2]), 1)


# --- variance and interval ---


def test_variance_of_equal_groups_by_hand() -> None:
    values = [0.5, 0.6, 0.7, 0.8]
    mean = sum(values) / 4
    expected = 3 / 4 * sum((v - mean) ** 2 for v in values)
    for value in (0.65, 0.9):  # around their mean, wherever the value lies
        assert jackknife_variance(value, LeftOut(values, [0.25] * 4)) == pytest.approx(expected, rel=1e-12)


def test_variance_of_a_weighted_mean_is_unbiased_for_unequal_groups() -> None:
    """A mean over tokens, of groups of other sizes: its variance is known, 1 / number of tokens."""
    sizes = torch.tensor([10.0, 20.0, 30.0, 40.0, 100.0], dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    shares, found = (sizes / sizes.sum()).tolist(), []
    for _ in range(4000):
        totals = sizes.sqrt() * torch.randn(5, dtype=torch.float64, generator=random)
        value = float(totals.sum() / sizes.sum())
        left_out = (totals.sum() - totals) / (sizes.sum() - sizes)
        found.append(jackknife_variance(value, LeftOut(left_out.tolist(), shares)))
    assert sum(found) / len(found) == pytest.approx(1 / 200, rel=0.05)


def test_interval_by_hand() -> None:
    """Standard errors 3 and 4 make 5; with 4 and 8 groups, 625 / (81 / 3 + 256 / 7) = 9.83 degrees of freedom."""
    a = LeftOut([-3.0, 3.0, 3.0, -3.0], [0.25] * 4)  # 3 / 4 of 36 = 27
    b = LeftOut([4.0, -4.0] * 4, [1 / 8] * 8)  # 7 / 8 of 128 = 112
    low, high = jackknife_interval(0.0, a, b, (-100.0, 100.0))
    freedom = (27 + 112) ** 2 / (27**2 / 3 + 112**2 / 7)
    from scipy.stats import t

    assert high == pytest.approx(t.ppf(0.975, freedom) * (27 + 112) ** 0.5, rel=1e-12)
    assert low == -high
    assert jackknife_interval(0.0, a, b, (-2.0, 3.0)) == (-2.0, 3.0)


def test_no_spread_is_no_width() -> None:
    one = LeftOut([0.5, 0.5], [0.5, 0.5])
    assert jackknife_interval(0.5, one, one, (0.0, 1.0)) == (0.5, 0.5)
    wide = jackknife_interval(0.5, one, LeftOut([0.4, 0.6], [0.5, 0.5]), (0.0, 1.0))
    assert wide == (0.0, 1.0)  # one degree of freedom: t = 12.7


SITES, D_FF, TOP = 4, 100, 5


def sums(n: int, noise: float, random: torch.Generator) -> Tensor:
    """Sums of n documents [n, sites, d_ff]: lognormal around the channel's own."""
    own = torch.exp(torch.randn(SITES, D_FF, generator=torch.Generator().manual_seed(99)))
    return (own * torch.exp(noise * torch.randn(n, SITES, D_FF, generator=random))).double()


def measure(name: str, a: Tensor, b: Tensor) -> float:
    """Agreement as a mean over sites, as in `agreement`."""
    found = [spearman(*pair) if name == "spearman" else jaccard(*pair, TOP) for pair in zip(a, b, strict=True)]
    return sum(v for v in found if v is not None) / SITES


def interval(name: str, first: Tensor, second: Tensor) -> tuple[float, float]:
    whole = first.sum(0), second.sum(0)
    value = measure(name, *whole)
    left: list[LeftOut] = []
    for documents, own, other in ((first, *whole), (second, *whole[::-1])):
        masks = document_groups(text(list(range(len(documents)))), GROUPS)
        values = [measure(name, own - documents[mask].sum(0), other) for mask in masks]
        left.append(LeftOut(values, [float(mask.double().mean()) for mask in masks]))
    return jackknife_interval(value, left[0], left[1], (-1.0, 1.0))


@pytest.mark.parametrize("name", ["spearman", "jaccard"])
@pytest.mark.parametrize(("n", "noise"), [(4, 1.0), (16, 0.5), (16, 2.0), (64, 1.0)])
def test_intervals_cover_the_agreement_of_fresh_calibrations(name: str, n: int, noise: float) -> None:
    random = torch.Generator().manual_seed(1)

    def draw() -> Tensor:
        return sums(n, noise, random)

    fresh = torch.tensor([measure(name, draw().sum(0), draw().sum(0)) for _ in range(100)], dtype=torch.float64)
    found = [interval(name, draw(), draw()) for _ in range(60)]
    covered = sum(low <= float(fresh.mean()) <= high for low, high in found)
    width = sum(high - low for low, high in found) / len(found)
    assert covered >= 54
    assert width < 2.5 * 2 * 1.96 * float(fresh.std())  # honest, but not empty


def test_intervals_shrink_with_more_documents() -> None:
    widths = {}
    for n in (8, 128):
        random = torch.Generator().manual_seed(0)
        found = [interval("spearman", sums(n, 2.0, random), sums(n, 2.0, random)) for _ in range(8)]
        widths[n] = sum(high - low for low, high in found) / len(found)
    assert widths[128] < 0.6 * widths[8]
