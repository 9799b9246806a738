"""What a notebook shows: DataFrames and HTML of scores, plans and results."""

from __future__ import annotations

import builtins
import html.parser
import math
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

from ffnscope.display import frame, html_table
from ffnscope.errors import UsageError
from ffnscope.evaluate.compare import EvalRow
from ffnscope.report.tables import results_frame, results_rows
from ffnscope.run import RunResult
from ffnscope.types import Budget, EvalResult, FFNSite, PruningPlan, Scores

NASTY = "<script>alert('&')</script>"


class Cells(html.parser.HTMLParser):
    """Collects the texts of the table cells and every tag."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def site(layer: int = 0, path: str = "layers.0.mlp", d_ff: int = 4) -> FFNSite:
    return FFNSite(layer, path, "gate", "up", "down", 4, d_ff)


@pytest.fixture
def scores() -> Scores:
    values = {site(): torch.tensor([0.5, -1.0, 2.0, 0.0]), site(1, NASTY, 2): torch.tensor([1.0, 3.0]).bfloat16()}
    return Scores(NASTY, values)


@pytest.fixture
def plan() -> PruningPlan:
    kept = {site(): torch.tensor([0, 2]), site(1, NASTY, 2): torch.tensor([1])}
    return PruningPlan(kept, NASTY, "local", Budget(0.5), {site(): torch.tensor([2])})


@pytest.fixture
def rows() -> list[EvalRow]:
    def made(name: str, value: float, stderr: float | None = 0.25) -> EvalResult:
        return EvalResult(name, value, "1", stderr, 100, NASTY, "blocks")

    dense = EvalRow("dense", None, 0.0, 0.0, NASTY, (made("perplexity", 10.0),))
    pruned = (made("perplexity", 12345.678), made("kl_to_dense", 0.5), made("top1_agreement", 0.75, None))
    return [dense, EvalRow("wanda-0.5", "wanda", 0.5, 0.49, NASTY, pruned)]


# --- pandas ---


def test_scores_as_a_frame(scores: Scores) -> None:
    found = scores.to_pandas()
    assert list(found.columns) == ["site", "layer", "channel", "score"]
    assert found["score"].tolist() == [0.5, -1.0, 2.0, 0.0, 1.0, 3.0]
    assert found["channel"].tolist() == [0, 1, 2, 3, 0, 1]
    assert found["layer"].tolist() == [0, 0, 0, 0, 1, 1]
    assert found["site"].unique().tolist() == ["layers.0.mlp", NASTY]


def test_plan_as_a_frame(plan: PruningPlan) -> None:
    found = plan.to_pandas()
    assert found.to_dict("list") == {
        "site": ["layers.0.mlp", NASTY],
        "layer": [0, 1],
        "d_ff": [4, 2],
        "kept": [2, 1],
        "sparsity": [0.5, 0.5],
        "protected": [1, 0],
    }


def test_results_as_a_frame(rows: list[EvalRow]) -> None:
    found = results_frame(rows)
    assert list(found.columns) == list(results_rows(rows)[0])
    assert found["perplexity"].tolist() == [10.0, 12345.678]
    assert found["metric"].isna().tolist() == [True, False]
    assert math.isnan(found["kl_to_dense"][0]) and found["kl_to_dense"][1] == 0.5
    empty = results_frame([])
    assert len(empty) == 0 and list(empty.columns) == list(found.columns)


def test_run_result_as_a_frame_and_as_html(rows: list[EvalRow], scores: Scores, plan: PruningPlan) -> None:
    result = RunResult(Path("runs/<i>"), {"a": scores}, {"b": plan}, rows, {})
    pandas.testing.assert_frame_equal(result.to_pandas(), results_frame(rows))
    text = result._repr_html_()
    assert "1 metric(s), 1 plan(s) in runs/&lt;i&gt;" in text
    found = Cells(text)
    assert found.rows[1][:4] == ["dense", NASTY, "0", "10"]
    assert found.rows[1][-2:] == ["–", "–"]  # the dense model has no distance to itself
    assert found.rows[2][3] == "1.235e+04"
    assert "<table>" not in RunResult(Path("runs/x"), {}, {}, [], {})._repr_html_()


def test_without_pandas(monkeypatch: pytest.MonkeyPatch, scores: Scores, plan: PruningPlan) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pandas":
            raise ModuleNotFoundError("No module named 'pandas'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    for call in (scores.to_pandas, plan.to_pandas, lambda: frame({"a": [1]}), lambda: results_frame([])):
        with pytest.raises(UsageError, match=r"^to_pandas\(\) needs pandas: pip install pandas$"):
            call()
    scores._repr_html_()  # needs nothing


# --- HTML ---


def test_html_of_scores(scores: Scores) -> None:
    found = Cells(scores._repr_html_())
    assert "script" not in found.tags
    assert found.rows == [
        ["site", "channels", "mean", "max", "best channel"],
        ["layers.0.mlp", "4", "0.375", "2", "2"],
        [NASTY, "2", "2", "3", "1"],
    ]
    assert "high = keep" in scores._repr_html_()


def test_html_of_a_plan(plan: PruningPlan) -> None:
    text = plan._repr_html_()
    found = Cells(text)
    assert "script" not in found.tags
    assert "sparsity 0.5000 (asked 0.5)" in text
    assert found.rows[0] == ["site", "layer", "d_ff", "kept", "sparsity", "protected"]
    assert found.rows[2] == [NASTY, "1", "2", "1", "0.5", "0"]


def test_html_table_escapes_and_formats() -> None:
    text = html_table({"<a>": [1, 2.0, None, True], "b": ["x & y", 1 / 3, "<", -1e-9]})
    found = Cells(text)
    assert found.tags == {"table", "thead", "tbody", "tr", "th", "td"}
    assert found.rows == [["<a>", "b"], ["1", "x & y"], ["2", "0.3333"], ["–", "<"], ["True", "-1e-09"]]
    assert Cells(html_table({"a": []})).rows == [["a"]]
