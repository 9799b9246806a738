from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from ffnscope.report.summary import QUANTILES, correlation_summary, natural_sign, rank_correlation, score_summary
from ffnscope.types import FFNSite, Scores


def one_site(d_ff: int, layer: int = 0) -> FFNSite:
    return FFNSite(layer, f"layers.{layer}.mlp", "gate_proj", "up_proj", "down_proj", 4, d_ff)


def strict(value: object) -> str:
    return json.dumps(value, allow_nan=False)


def test_summary_by_hand():
    site = one_site(5, layer=3)
    found = score_summary({"wanda": Scores("wanda", {site: torch.tensor([4.0, 0.0, 1.0, 3.0, 2.0])})})
    row = found["wanda"]["sites"]["layers.3.mlp"]
    assert found["wanda"]["natural_sign"] == 1
    assert (row["layer"], row["d_ff"], row["min"], row["max"]) == (3, 5, 0.0, 4.0)
    assert row["mean"] == pytest.approx(2.0)
    assert row["std"] == pytest.approx(math.sqrt(2.0))
    assert list(row["quantiles"]) == ["0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99"]
    assert row["quantiles"]["0.25"] == pytest.approx(1.0)
    assert row["quantiles"]["0.95"] == pytest.approx(3.8)


def test_summary_shows_natural_values(low_is_keep: str):
    assert natural_sign(low_is_keep) == -1
    assert natural_sign("made by hand") == 1
    scores = Scores(low_is_keep, {one_site(3): torch.tensor([-1.0, -2.0, 0.0])})
    row = score_summary({low_is_keep: scores})[low_is_keep]["sites"]["layers.0.mlp"]
    assert (row["min"], row["max"], row["mean"]) == (0.0, 2.0, pytest.approx(1.0))
    assert math.copysign(1.0, row["min"]) == 1.0
    assert row["quantiles"]["0.5"] == pytest.approx(1.0)


@pytest.mark.parametrize("value", [0.0, -3.0, 3e38, 1e-38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_summary_of_constant_and_extreme_scores_is_strict_json(value: float, dtype: torch.dtype):
    scores = torch.full((7,), value, dtype=dtype)
    found = score_summary({"wanda": Scores("wanda", {one_site(7): scores})})
    row = found["wanda"]["sites"]["layers.0.mlp"]
    strict(found)
    assert row["mean"] == pytest.approx(float(scores[0]))
    assert row["std"] == pytest.approx(0.0, abs=1e-12 * abs(value))
    assert all(mark == pytest.approx(float(scores[0])) for mark in row["quantiles"].values())


def test_summary_in_double_precision_does_not_overflow():
    row = score_summary({"m": Scores("m", {one_site(2): torch.tensor([1e200, -1e200], dtype=torch.float64)})})
    assert row["m"]["sites"]["layers.0.mlp"]["std"] == pytest.approx(1e200)


def test_summary_names_experts_apart(sites, heavy):
    found = score_summary({"wanda": heavy("wanda", sites(2, experts=3))})
    assert list(found["wanda"]["sites"])[:2] == ["layers.0.mlp.experts.0", "layers.0.mlp.experts.1"]
    assert len(found["wanda"]["sites"]) == 6
    assert len(QUANTILES) == 7


def test_rank_correlation_is_the_mean_of_scipy_with_ties(sites, heavy):
    places = sites(3)
    tied = heavy("tied", places, seed=1, change=torch.round)
    scores = {"a": heavy("a", places), "tied": tied, "b": heavy("b", places, seed=2)}
    names, matrix = rank_correlation(scores)
    found = correlation_summary(scores)
    assert names == ["a", "tied", "b"]
    for i, x in enumerate(names):
        for j, y in enumerate(names):
            each = [spearmanr(scores[x].values[s], scores[y].values[s]).statistic for s in places]
            assert matrix[i][j] == pytest.approx(np.mean(each))
            assert found["min"][i][j] == pytest.approx(min(each))
            assert found["max"][i][j] == pytest.approx(max(each))
            assert found["n_sites"][i][j] == 3


def test_constant_scores_have_no_correlation(sites, heavy):
    places = sites(2)
    flat = Scores("flat", {site: torch.full((site.d_ff,), 0.5) for site in places})
    found = correlation_summary({"a": heavy("a", places), "flat": flat})
    assert found["mean"] == [[1.0, None], [None, None]]
    assert found["min"] == found["max"] == found["mean"]
    assert found["n_sites"] == [[2, 0], [0, 0]]
    strict(found)


def test_sites_without_a_correlation_are_left_out_of_the_mean(sites, heavy):
    first, second, third = sites(3)
    a = heavy("a", [first, second, third])
    b = Scores("b", {first: -a.values[first], second: torch.zeros(64)})
    _, matrix = rank_correlation({"a": a, "b": b})
    assert matrix == [[1.0, pytest.approx(-1.0)], [pytest.approx(-1.0), 1.0]]
    assert correlation_summary({"a": a, "b": b})["n_sites"] == [[3, 1], [1, 1]]


def test_one_channel_and_no_metric():
    assert rank_correlation({"a": Scores("a", {one_site(1): torch.tensor([2.0])})}) == (["a"], [[None]])
    assert rank_correlation({}) == ([], [])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=40).filter(lambda v: len(set(v)) > 1))
def test_a_monotone_change_of_scores_keeps_the_ranks(values: list[int]):
    site, scores = one_site(len(values)), torch.tensor(values, dtype=torch.float64)
    of = {name: Scores(name, {site: v}) for name, v in {"a": scores, "b": scores**3 + 7, "c": -scores}.items()}
    _, matrix = rank_correlation(of)
    assert matrix[0] == [1.0, pytest.approx(1.0), pytest.approx(-1.0)]
    assert np.allclose(np.array(matrix, dtype=float), np.array(matrix, dtype=float).T)
