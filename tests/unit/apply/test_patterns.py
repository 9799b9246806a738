"""Which single weights stay."""

from __future__ import annotations

import pytest
import torch

from ffnscope.apply.patterns import Pattern, highest, pattern_of
from ffnscope.errors import UsageError


class TestPatternOf:
    @pytest.mark.parametrize(
        ("asked", "sparsity", "label"), [("2:4", 0.5, "2:4"), ("4:8", 0.5, "4:8"), ("1:4", 0.75, "1:4")]
    )
    def test_n_of_m_stay(self, asked: str, sparsity: float, label: str) -> None:
        found = pattern_of(asked)
        assert (found.sparsity, found.label) == (sparsity, label)

    def test_a_fraction_is_unstructured(self) -> None:
        assert pattern_of(0.3) == Pattern(0.3)
        assert pattern_of(0).label == "unstructured"

    @pytest.mark.parametrize("asked", ["0:4", "4:4", "5:4", "2-4", "half", ""])
    def test_other_words_are_refused(self, asked: str) -> None:
        with pytest.raises(UsageError, match=r"N:M with 0 < N < M, such as '2:4' .*; got"):
            pattern_of(asked)

    @pytest.mark.parametrize("asked", [1, 1.5, -0.1, 50, float("nan")])
    def test_other_fractions_are_refused(self, asked: float) -> None:
        with pytest.raises(UsageError, match=r"sparsity must be in \[0, 1\), the fraction of weights to remove; got"):
            pattern_of(asked)

    def test_counts_are_rounded_down_but_not_by_rounding_errors(self) -> None:
        assert Pattern(0.29).n_removed(100) == 29
        assert Pattern(0.3).n_removed(576) == 172


class TestHighest:
    def test_by_hand(self) -> None:
        scores = torch.tensor([[5.0, 1, 2, 3, 9, 8, 7, 6]])
        assert highest(scores, Pattern(0.25)).int().tolist() == [[1, 0, 0, 1, 1, 1, 1, 1]]
        assert highest(scores, pattern_of("2:4")).int().tolist() == [[1, 0, 0, 1, 1, 1, 0, 0]]
        assert highest(scores, pattern_of("4:8")).int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]

    def test_of_equal_scores_the_last_stay(self) -> None:
        assert highest(torch.zeros(2, 4), Pattern(0.5)).int().tolist() == [[0, 0, 1, 1]] * 2

    @pytest.mark.parametrize("asked", [0, 0.31, 0.5, 0.99, "2:4", "4:8", "3:4"])
    def test_every_row_and_group_has_its_count(self, asked: float | str) -> None:
        pattern = pattern_of(asked)
        mask = highest(torch.randn(7, 16), pattern)
        rows = mask if pattern.group is None else mask.reshape(-1, pattern.group[1])
        stay = 16 - int(pattern.sparsity * 16) if pattern.group is None else pattern.group[0]
        assert (rows.sum(1) == stay).all()
