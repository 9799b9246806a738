"""Tokens of rows, told by the memory that the rows lie in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope.ffn.picks import Picks

N, WIDTH = 6, 4
HIDDEN = torch.arange(N * WIDTH, dtype=torch.float32).view(N, WIDTH)
ORDER = torch.tensor([5, 0, 3, 3])


def picks_of(index: Any, source: Tensor = HIDDEN) -> tuple[Picks, Tensor]:
    picks, rows = Picks(N), source[index]
    picks.note((source, index), {}, rows)
    return picks, rows


def told(picks: Picks, x: Tensor) -> list[int] | None:
    tokens = picks.tokens(x)
    return None if tokens is None else tokens.tolist()


@pytest.mark.parametrize(
    ("index", "tokens"),
    [
        (ORDER, [5, 0, 3, 3]),
        ([4, 1], [4, 1]),
        (torch.tensor([True, False, False, True, False, True]), [0, 3, 5]),
    ],
)
def test_rows_and_pieces_of_them(index: Any, tokens: list[int]) -> None:
    picks, rows = picks_of(index)
    assert told(picks, rows) == tokens
    assert told(picks, rows[1:]) == tokens[1:]
    assert told(picks, rows[:0]) == []


def test_a_leading_axis() -> None:
    picks, rows = picks_of((None, ORDER))
    assert told(picks, rows.reshape(-1, WIDTH)) == ORDER.tolist()


def test_a_mask_over_windows() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    picks, rows = picks_of(mask, HIDDEN.view(2, 3, WIDTH))
    assert told(picks, rows) == [0, 2, 5]


def test_rows_of_picked_rows() -> None:
    picks, rows = picks_of(ORDER)
    again = rows[[2, 1]]
    picks.note((rows, [2, 1]), {}, again)
    assert told(picks, again) == [3, 0]
    half = rows[1:][[0]]
    picks.note((rows[1:], [0]), {}, half)
    assert told(picks, half) == [0]


def test_arguments_by_name() -> None:
    picks, rows = Picks(N), HIDDEN.index_select(0, ORDER)
    picks.note((), {"input": HIDDEN, "dim": 0, "index": ORDER}, rows)
    assert told(picks, rows) == ORDER.tolist()


def test_other_rows_are_not_told() -> None:
    picks, rows = picks_of(ORDER)
    assert told(picks, rows.clone()) is None
    assert told(picks, HIDDEN) is None
    assert told(picks_of(ORDER, HIDDEN.repeat(2, 1))[0], rows) is None


@pytest.mark.parametrize(("source", "index"), [(HIDDEN, 2), (HIDDEN, (slice(None), 1)), (HIDDEN.long(), ORDER)])
def test_what_picks_no_rows_is_passed_over(source: Tensor, index: Any) -> None:
    picks, rows = picks_of(index, source)
    assert told(picks, torch.atleast_2d(rows)) is None


def test_columns_are_no_tokens() -> None:
    columns, picks = torch.tensor([1, 0, 3]), Picks(N)
    rows = HIDDEN.index_select(1, columns)
    picks.note((HIDDEN, 1, columns), {}, rows)
    assert told(picks, rows) is None
