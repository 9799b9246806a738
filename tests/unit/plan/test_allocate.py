from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.plan.allocate import global_, kept_count, local, round_width
from ffnscope.types import Budget, FFNSite, Scores


def scores_of(values: list[list[float]] | list[Tensor]) -> Scores:
    rows = [torch.as_tensor(v, dtype=torch.float64) for v in values]
    sites = [FFNSite(i, f"layers.{i}.mlp", None, "up", "down", 4, len(row)) for i, row in enumerate(rows)]
    return Scores("random", dict(zip(sites, rows, strict=True)))


def widths(found: dict[FFNSite, int]) -> list[int]:
    return list(found.values())


some_scores = st.lists(st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=24), min_size=1, max_size=5)
some_sparsity = st.integers(0, 99).map(lambda n: n / 100)


class TestKeptCount:
    @pytest.mark.parametrize(
        ("d_ff", "sparsity", "kept"),
        [
            (10, 0.3, 7),  # 10 * 0.3 = 3.0000000000000004 in floating point
            (100, 0.29, 71),  # 100 * 0.29 = 28.999999999999996
            (5, 0.5, 3),  # halves are kept
            (7, 0.5, 4),
            (3, 1 / 3, 2),
            (11008, 0.0, 11008),
            (1536, 0.2, 1229),
            (1, 0.9, 0),
            (1000, 1e-5, 1000),
        ],
    )
    def test_by_hand(self, d_ff: int, sparsity: float, kept: int) -> None:
        assert kept_count(d_ff, sparsity) == kept

    @given(st.integers(1, 20000), some_sparsity)
    def test_never_more_than_half_a_channel_off(self, d_ff: int, sparsity: float) -> None:
        assert abs(Fraction(str(sparsity)) * d_ff - (d_ff - kept_count(d_ff, sparsity))) <= Fraction(1, 2)


class TestRoundWidth:
    @pytest.mark.parametrize(
        ("width", "multiple", "least", "found"),
        [(11, 8, 1, 8), (12, 8, 1, 16), (3, 8, 1, 8), (0, 1, 1, 1), (20, 8, 1, 16), (2, 4, 9, 12), (7, 1, 10, 10)],
    )
    def test_by_hand(self, width: int, multiple: int, least: int, found: int) -> None:
        assert round_width(width, 20, Budget(0.0, multiple, least)) == found

    @given(st.integers(0, 64), st.integers(1, 64), st.integers(1, 70), st.integers(1, 70))
    def test_within_bounds_or_an_error(self, width: int, d_ff: int, multiple: int, least: int) -> None:
        allowed = [w for w in range(multiple, d_ff + 1, multiple) if w >= least]
        if not allowed:
            with pytest.raises(UsageError, match=f"no width of at least {least} that is a multiple of {multiple} fits"):
                round_width(width, d_ff, Budget(0.0, multiple, least))
        else:
            found = round_width(width, d_ff, Budget(0.0, multiple, least))
            assert found == max(w for w in allowed if abs(w - width) == min(abs(a - width) for a in allowed))


class TestLocal:
    def test_the_same_sparsity_everywhere(self) -> None:
        scores = scores_of([[1.0] * 10, [100.0] * 20])
        assert widths(local(scores, Budget(0.3))) == [7, 14]
        assert widths(local(scores, Budget(0.3, multiple_of=4))) == [8, 16]
        assert widths(local(scores, Budget(0.5, min_width=6))) == [6, 9]  # 5 and 10 without the floor
        with pytest.raises(UsageError, match=r"keep 10 channels of 2 FFNs.*a sparsity of 0.9 leaves 3"):
            local(scores, Budget(0.9, min_width=5))

    @given(some_scores, some_sparsity)
    def test_exact(self, values: list[list[float]], sparsity: float) -> None:
        for site, width in local(scores_of(values), Budget(sparsity)).items():
            assert width == max(1, kept_count(site.d_ff, sparsity))


class TestGlobal:
    def test_by_hand(self) -> None:
        scores = scores_of([[9.0, 1.0, 8.0, 2.0], [3.0, 7.0, 0.0, 0.5]])
        assert widths(global_(scores, Budget(0.5))) == [2, 2]
        assert widths(global_(scores, Budget(0.75))) == [1, 1]  # 9 and 8, but each site keeps one
        assert widths(global_(scores, Budget(0.25))) == [4, 2]

    def test_ties_go_to_the_earlier_site(self) -> None:
        scores = scores_of([[1.0] * 4, [1.0] * 4])
        assert widths(global_(scores, Budget(0.5))) == [3, 1]
        assert widths(global_(scores, Budget(0.5, min_width=2))) == [2, 2]

    def test_scores_that_float32_cannot_tell_apart(self) -> None:
        scores = scores_of([[1.0, 1.0], [1.0 + 1e-12, 1.0 + 1e-12]])
        assert widths(global_(scores, Budget(0.25))) == [1, 2]

    @settings(max_examples=200)
    @given(some_scores, some_sparsity, st.integers(1, 4))
    def test_against_a_sort_by_hand(self, values: list[list[float]], sparsity: float, least: int) -> None:
        scores = scores_of(values)
        least = min(least, *(len(row) for row in values))
        target = kept_count(sum(len(row) for row in values), sparsity)
        if least * len(values) > target:
            with pytest.raises(UsageError, match=f"(need|keep) {least * len(values)} channels"):
                global_(scores, Budget(sparsity, 1, least))
            return
        kept = [
            (i, j) for i, row in enumerate(values) for j in sorted(range(len(row)), key=lambda j: (-row[j], j))[:least]
        ]
        rest = [(i, j) for i, row in enumerate(values) for j in range(len(row)) if (i, j) not in kept]
        kept += sorted(rest, key=lambda place: (-values[place[0]][place[1]], place))[: target - len(kept)]
        expected = [sum(i == site for i, _ in kept) for site in range(len(values))]
        assert widths(global_(scores, Budget(sparsity, 1, least))) == expected

    @settings(max_examples=200)
    @given(some_scores, some_sparsity, st.integers(1, 8), st.integers(1, 8))
    def test_multiples(self, values: list[list[float]], sparsity: float, multiple: int, least: int) -> None:
        budget = Budget(sparsity, multiple, least)
        try:
            found = global_(scores_of(values), budget)
        except UsageError:
            return
        target = kept_count(sum(len(row) for row in values), sparsity)
        for site, width in found.items():
            assert width % multiple == 0 and least <= width <= site.d_ff
        missing = target - sum(found.values())
        largest = all(w + multiple > s.d_ff for s, w in found.items())
        assert 2 * abs(missing) <= multiple or (missing > 0 and largest)

    def test_multiples_move_where_rounding_was_worst(self) -> None:
        scores = scores_of([[5.0] * 6 + [0.0] * 6, [5.0] * 6 + [0.0] * 6, [5.0] * 5 + [0.0] * 7])
        assert widths(global_(scores, Budget(19 / 36, multiple_of=4))) == [8, 4, 4]

    def test_a_budget_that_multiples_cannot_meet(self) -> None:
        with pytest.raises(UsageError, match=r"multiple_of 8 need 16 channels in 2 sites; a sparsity of 0.5 leaves 8"):
            global_(scores_of([[1.0] * 8, [1.0] * 8]), Budget(0.5, multiple_of=8))

    def test_a_multiple_that_does_not_fit(self) -> None:
        with pytest.raises(UsageError, match="no width of at least 1 that is a multiple of 16 fits into 8 channels"):
            global_(scores_of([[1.0] * 8]), Budget(0.5, multiple_of=16))
