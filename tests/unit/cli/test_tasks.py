"""`ffnscope eval --task`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from faults import stop_at
from ffnscope.cli import channels
from ffnscope.evaluate import tasks as evaluating

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what lm-eval imports
SMALL = ("--num-samples", 2, "--max-length", 16)


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"query": "The people of the", "choices": ["United States", "war"], "answer": 0}))
    return path


def test_tasks_beside_the_perplexity(
    ok: Callable[..., Result], checkpoint: Path, texts: Path, questions: Path, tmp_path: Path
) -> None:
    common = (checkpoint, "--text", texts / "test.txt", *SMALL)
    out = tmp_path / "rows.json"
    shown = ok("eval", *common, "--task", questions, "--num-fewshot", 0, "--limit", 1, "--out", out).stdout
    assert "questions, 0-shot (1): acc_norm" in shown and "perplexity" in shown.lower()
    rows = json.loads((tmp_path / "rows.tasks.json").read_text())
    assert [row["metric"] for row in rows["rows"]] == ["acc", "acc_norm"]
    assert json.loads(out.read_text())["rows"][0]["label"] == "dense"


def test_an_interrupted_evaluation_goes_on(
    ok: Callable[..., Result],
    fails: Callable[..., str],
    checkpoint: Path,
    texts: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cut off in the second of two tasks, or between its two tables: only the second task is left to run, or none."""
    second = tmp_path / "second.jsonl"
    second.write_text(questions.read_text())
    common = ("eval", checkpoint, "--text", texts / "test.txt", *SMALL, "--task", questions, "--task", second, "--out")
    ok(*common, tmp_path / "whole.json")
    out = tmp_path / "out" / "rows.json"
    out.parent.mkdir()
    with monkeypatch.context() as patch:
        stop_at(patch, evaluating, "_run", 2)
        said = fails(130, *common, out)
    assert "and `eval --out` go on" in said
    assert [path.name for path in out.parent.iterdir()] == [".rows.json.eval.part"]
    kept = {path.name for path in out.with_name(".rows.json.eval.part").iterdir()}
    assert kept == {"inputs.json", "text.json", "tasks.json"}
    with monkeypatch.context() as patch:
        left = stop_at(patch, evaluating, "_run", 0)
        stop_at(patch, channels, "write_table", 2)
        fails(130, *common, out)
    assert len(left) == 1
    assert "Beside it lies .rows.json.eval.part, of a call that did not end" in fails(1, *common, out)
    with monkeypatch.context() as patch:
        left = stop_at(patch, evaluating, "_run", 0)
        ok(*common, out, "--overwrite")
    assert not left
    assert {path.name for path in out.parent.iterdir()} == {"rows.json", "rows.tasks.json"}
    for name in ("rows.json", "rows.tasks.json"):
        assert (out.parent / name).read_text() == (tmp_path / name.replace("rows", "whole")).read_text()


def test_what_is_refused_before_the_model_loads(fails: Callable[..., str], tmp_path: Path, questions: Path) -> None:
    missing = tmp_path / "no model"
    assert "--limit would do nothing without --task" in fails(2, "eval", missing, "--limit", 3)
    assert "--num-fewshot would do nothing without --task" in fails(2, "eval", missing, "--num-fewshot", 3)
    assert "nowhere.jsonl cannot be read" in fails(2, "eval", missing, "--task", "nowhere.jsonl")
    (tmp_path / "rows.tasks.csv").touch()
    assert "rows.tasks.csv" in fails(1, "eval", missing, "--task", questions, "--out", tmp_path / "rows.csv")
