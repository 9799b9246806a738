"""Stability over calibrations: values, and intervals that mean what they say, for every metric."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope.analyze.agreement import agreement
from ffnscope.analyze.jackknife import LeftOut, jackknife_interval
from ffnscope.analyze.levels import CoreRule
from ffnscope.analyze.question import Question
from ffnscope.analyze.repeat_passes import Method
from ffnscope.analyze.repeats import Repeat, repeat_scores
from ffnscope.analyze.stability import stability, stability_rows
from ffnscope.calibrate.windows import Windows, contiguous_windows
from ffnscope.errors import UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.registry import METRICS
from ffnscope.types import FFNSite, Scores
from tiny import tiny, tokens

SITE = FFNSite(0, "model.layers.0.mlp", "gate_proj", "up_proj", "down_proj", 32, 6, "silu")
ALL = {name: {} for name in METRICS.names() if METRICS.get(name).fn.__module__.startswith("ffnscope.")}


def scores(values: Sequence[float] | Tensor, metric: str = "mine") -> Scores:
    return Scores(metric, {SITE: torch.as_tensor(values, dtype=torch.float64)})


def repeat(whole: Sequence[float], *without: Sequence[float], method: Method = "jackknife") -> Repeat:
    """A repeat of equal groups; without any, of one document."""
    groups = max(1, len(without))
    tables = [{"mine": scores(values)} for values in without]
    return Repeat({"mine": scores(whole)}, tables, [1 / groups] * groups, groups, {"mine": method})


def test_an_interval_by_hand() -> None:
    """Both score tables without each group, compared with the other whole table."""
    a, a_left = [1, 2, 3, 4, 5, 6], ([1, 2, 3, 4, 6, 5], [2, 1, 3, 4, 5, 6], [1, 2, 4, 3, 5, 6])
    b, b_left = [1, 3, 2, 4, 6, 5], ([1, 2, 3, 4, 5, 6], [3, 1, 2, 4, 6, 5])
    (row,) = stability({"a": repeat(a, *a_left), "b": repeat(b, *b_left)})
    assert row.value == agreement(scores(a), scores(b))
    assert (row.metric, row.first, row.second, row.method) == ("mine", "a", "b", "jackknife")
    assert (row.documents, row.groups) == ((3, 2), (3, 2))
    for name, found, bounds in (
        ("spearman", row.spearman_interval, (-1.0, 1.0)),
        ("jaccard", row.jaccard_interval, (0.0, 1.0)),
    ):
        first = [getattr(agreement(scores(v), scores(b)), name) for v in a_left]
        second = [getattr(agreement(scores(a), scores(v)), name) for v in b_left]
        left = LeftOut(first, [1 / 3] * 3), LeftOut(second, [1 / 2] * 2)
        assert found == jackknife_interval(getattr(row.value, name), *left, bounds)
    assert row.spearman_interval is not None
    assert -1 <= row.spearman_interval[0] < row.value.spearman < row.spearman_interval[1] <= 1


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    """Every metric between two random texts of a tiny model: metric -> row."""
    model = tiny("llama")

    def text(seed: int) -> Windows:
        return contiguous_windows(tokens(10, 16, seed), "random tokens", torch.arange(10) // 2)

    asked = Question(model, find_sites(model), ALL, CoreRule(count=3), tiny("llama", seed=7))
    repeats = {f"text {seed}": repeat_scores(asked, text(seed)) for seed in (0, 1)}
    return {row.metric: row for row in stability(repeats)}


@pytest.mark.parametrize("metric", ALL)
def test_every_metric_has_intervals(rows: dict[str, Any], metric: str) -> None:
    row = rows[metric]
    assert list(rows) == list(ALL)
    low, high = row.spearman_interval
    assert -1 <= low <= row.value.spearman <= high <= 1
    narrow, wide = row.jaccard_interval
    assert 0 <= narrow <= row.value.jaccard <= wide <= 1
    assert (row.documents, row.groups) == ((5, 5), (5, 5))
    if row.method == "no text":
        assert (low, high, narrow, wide) == (1.0, 1.0, 1.0, 1.0)
    else:
        assert row.method == "jackknife"
        assert low < high


def test_identical_calibrations_agree_wholly() -> None:
    model = tiny("llama")
    asked = Question(model, find_sites(model), {"wanda": {}, "sparsegpt": {}, "random": {"seed": 3}})
    one = repeat_scores(asked, contiguous_windows(tokens(6, 12), "random tokens"))
    for row in stability({"a": one, "b": one}):
        assert (row.value.spearman, row.value.jaccard) == (1.0, 1.0)
        assert row.spearman_interval is not None and row.spearman_interval[1] == 1.0


def test_pairs_are_in_order_and_progress_counts_them() -> None:
    one, calls = repeat([1, 2, 3, 4, 5, 6]), []
    found = stability({"a": one, "b": one, "c": one}, lambda *now: calls.append(now))
    assert [(row.first, row.second) for row in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("method", ["one document", "maximum"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_calibration_without_groups_leaves_the_pair_without_intervals(method: Method, order: int) -> None:
    many = repeat([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6, 5], [2, 1, 3, 4, 5, 6])
    one = repeat([1, 2, 3, 4, 5, 6], method=method)
    (row,) = stability(dict(zip("ab", (many, one)[::order], strict=True)))
    assert row.method == method
    assert row.spearman_interval is row.jaccard_interval is None
    assert row.groups == (2, 1)[::order]


def test_a_metric_that_reads_no_text_varies_with_its_seed_alone() -> None:
    a, b = repeat([1, 2, 3, 4, 5, 6], method="no text"), repeat([6, 5, 4, 3, 2, 1], method="no text")
    (row,) = stability({"a": a, "b": b})
    assert row.spearman_interval == (-1.0, -1.0)
    assert row.jaccard_interval == (0.0, 0.0)


def test_constant_scores_have_no_correlation_and_no_interval() -> None:
    flat = [1, 1, 1, 1, 1, 1]
    (row,) = stability({"a": repeat(flat, flat, flat), "b": repeat(flat, flat, flat)})
    assert row.value.spearman is row.spearman_interval is None
    assert row.value.jaccard == 1.0
    assert row.jaccard_interval == (1.0, 1.0)
    rising = [1, 2, 3, 4, 5, 6]
    (row,) = stability({"a": repeat(rising, flat, rising), "b": repeat(rising, rising, rising)})
    assert row.value.spearman == 1.0
    assert row.spearman_interval is None  # one group carries it all
    (row,) = stability(dict.fromkeys("ab", repeat(flat, method="no text")))
    assert row.spearman_interval is None


def test_rows_are_flat() -> None:
    many = repeat([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6, 5], [2, 1, 3, 4, 5, 6])
    (row,) = stability({"a": many, "b": many})
    assert row.spearman_interval is not None and row.jaccard_interval is not None
    assert stability_rows([row, dataclasses.replace(row, spearman_interval=None, jaccard_interval=None)]) == [
        {
            "metric": "mine",
            "first": "a",
            "second": "b",
            "spearman": row.value.spearman,
            "spearman_low": low,
            "spearman_high": high,
            "top1_jaccard": row.value.jaccard,
            "top1_jaccard_low": narrow,
            "top1_jaccard_high": wide,
            "interval_method": "jackknife",
            "documents_first": 2,
            "documents_second": 2,
            "groups_first": 2,
            "groups_second": 2,
        }
        for low, high, narrow, wide in (
            (*row.spearman_interval, *row.jaccard_interval),
            (None, None, None, None),
        )
    ]


def test_refusals() -> None:
    one = repeat([1, 2, 3, 4, 5, 6])
    with pytest.raises(UsageError, match="stability needs at least two calibrations: other seeds, or other texts"):
        stability({"a": one})
    other = dataclasses.replace(one, whole={"wanda": scores([1, 2, 3, 4, 5, 6], "wanda")})
    with pytest.raises(UsageError, match="calibration 'b' was scored by wanda, another by mine; score all by the same"):
        stability({"a": one, "b": other})
