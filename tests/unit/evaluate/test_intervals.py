"""Means over tokens with intervals over documents, by hand."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import ttest_1samp

from ffnscope.errors import UsageError
from ffnscope.evaluate.intervals import over_documents, t_quantile


def test_documents_of_equal_size_give_the_interval_of_their_means() -> None:
    values, document = torch.tensor([1.0, 3.0, 4.0, 6.0, 0.0, 0.0]), torch.tensor([7, 7, 2, 2, 9, 9])
    found = over_documents(values, document)
    expected = ttest_1samp([2.0, 5.0, 0.0], 0).confidence_interval(0.95)
    assert (found.value, found.documents) == (pytest.approx(14 / 6), 3)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert found.sign == 0


def test_counts_weigh_and_documents_without_any_do_not_count() -> None:
    sums, counts = torch.tensor([2.0, 9.0, 5.0]), torch.tensor([1, 3, 0])
    found = over_documents(sums - torch.tensor([0.0, 0.0, 5.0]), torch.tensor([0, 1, 2]), counts)
    assert (found.value, found.documents) == (pytest.approx(11 / 4), 2)
    assert over_documents(torch.tensor([4.0]), torch.tensor([3])).low is None


def test_signs() -> None:
    document = torch.arange(3)
    assert over_documents(torch.tensor([1.0, 1.1, 0.9]), document).sign == 1
    assert over_documents(torch.tensor([-1.0, -1.1, -0.9]), document).sign == -1
    assert over_documents(torch.tensor([4.0]), torch.tensor([3])).sign == 0


def test_nothing_to_count() -> None:
    with pytest.raises(UsageError, match="nothing to average"):
        over_documents(torch.zeros(2), torch.arange(2), torch.zeros(2))


def test_quantile() -> None:
    assert t_quantile(4) == pytest.approx(2.7764, abs=1e-4)
