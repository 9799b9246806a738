"""Channels as rows, in the order of a metric."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ffnscope.errors import UsageError
from ffnscope.report.ranking import ranking
from ffnscope.types import FFNSite, Scores


@pytest.fixture
def scores(sites: Callable[..., list[FFNSite]]) -> Scores:
    first, second = sites(2, d_ff=4, step=3)
    values = {first: torch.tensor([0.5, 2.0, 0.5, -1.0]), second: torch.tensor([3.0, 0.5, 0.0, 7.0])}
    return Scores("by hand", values)


def order(rows: list[dict]) -> list[tuple[int, int]]:
    return [(row["layer"], row["channel"]) for row in rows]


def test_the_most_important_come_first_and_ties_keep_their_order(scores: Scores) -> None:
    rows = ranking(scores)
    assert order(rows) == [(3, 3), (3, 0), (0, 1), (0, 0), (0, 2), (3, 1), (3, 2), (0, 3)]
    assert [row["rank"] for row in rows] == list(range(1, 9))
    assert [row["value"] for row in rows] == [7.0, 3.0, 2.0, 0.5, 0.5, 0.5, 0.0, -1.0]
    assert rows[0] == {"rank": 1, "site": "layers.3.mlp", "layer": 3, "channel": 3, "value": 7.0, "share_below": 0.75}


def test_lowest_first(scores: Scores) -> None:
    rows = ranking(scores, lowest=True)
    assert order(rows) == [(0, 3), (3, 2), (0, 0), (0, 2), (3, 1), (0, 1), (3, 0), (3, 3)]


def test_share_below_counts_lower_scores_of_the_own_site(scores: Scores) -> None:
    found = {(row["layer"], row["channel"]): row["share_below"] for row in ranking(scores)}
    assert [found[0, c] for c in range(4)] == [0.25, 0.75, 0.25, 0.0]
    assert [found[3, c] for c in range(4)] == [0.5, 0.25, 0.0, 0.75]


def test_top_is_a_head_of_all(scores: Scores) -> None:
    assert ranking(scores, 3) == ranking(scores)[:3]
    assert ranking(scores, 3, lowest=True) == ranking(scores, lowest=True)[:3]
    assert ranking(scores, 100) == ranking(scores)
    with pytest.raises(UsageError, match="top must be at least 1 row; got 0"):
        ranking(scores, 0)


def test_values_have_their_natural_sign(sites: Callable[..., list[FFNSite]], low_is_keep: str) -> None:
    (site,) = sites(1, d_ff=3)
    rows = ranking(Scores(low_is_keep, {site: torch.tensor([-2.0, -0.0, -1.0])}))
    assert [(row["channel"], row["value"]) for row in rows] == [(1, 0.0), (2, 1.0), (0, 2.0)]
    assert str(rows[0]["value"]) == "0.0"  # not -0.0


def test_half_precision_and_experts(sites: Callable[..., list[FFNSite]]) -> None:
    first, second = sites(1, d_ff=2, experts=2)
    values = {first: torch.tensor([1.0, 4.0]).bfloat16(), second: torch.tensor([3.0, 2.0]).double()}
    rows = ranking(Scores("by hand", values))
    assert [(row["site"], row["channel"]) for row in rows] == [
        ("layers.0.mlp.experts.0", 1),
        ("layers.0.mlp.experts.1", 0),
        ("layers.0.mlp.experts.1", 1),
        ("layers.0.mlp.experts.0", 0),
    ]
