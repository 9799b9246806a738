"""Downstream tasks of a run: files, resume, and what is found before anything long starts."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from ffnscope.errors import ConfigError, TextError
from ffnscope.run import RunConfig
from ffnscope.run.dry_run import dry_run
from runs import quiet_run, results, strict_json

ROW = {"query": "The people of the", "choices": ["United States", "war"], "answer": 0}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what lm-eval imports


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join([json.dumps(ROW)] * 3))
    return path


def test_tasks_of_a_run(small: Callable[..., RunConfig], questions: Path) -> None:
    config = small(evaluation={"tasks": {"names": [str(questions)], "limit": 2, "num_fewshot": 1}})
    result = quiet_run(config)
    labels = ["dense", *result.plans]
    assert [(r.label, r.result.name) for r in result.tasks] == [(m, n) for m in labels for n in ("acc", "acc_norm")]
    rows = strict_json(result.folder / "tasks.json")["rows"]
    assert rows == [r.as_dict() for r in result.tasks] == strict_json(result.folder / "summary.json")["tasks"]
    assert {(r["n"], r["num_fewshot"]) for r in rows} == {(2, 1)}
    with (result.folder / "tasks.csv").open() as file:
        assert [row["label"] for row in csv.DictReader(file)] == [row["label"] for row in rows]
    text = (result.folder / "results.md").read_text()
    assert "### Downstream tasks" in text and "| questions, 1-shot (2): acc ↑ |" in text
    before = results(result.folder)
    assert quiet_run(config).tasks == result.tasks and results(result.folder) == before


def test_only_the_tasks_run_again_when_their_file_changes(small: Callable[..., RunConfig], questions: Path) -> None:
    config = small(evaluation={"tasks": {"names": [str(questions)]}})
    first = quiet_run(config)
    stages = strict_json(first.folder / "ledger.json")["stages"]
    questions.write_text(json.dumps(ROW))
    second = quiet_run(config)
    assert {r.result.n for r in first.tasks} == {3} and {r.result.n for r in second.tasks} == {1}
    again = strict_json(first.folder / "ledger.json")["stages"]
    assert {name for name in stages if stages[name] != again[name]} == {"tasks", "report"}


def test_a_missing_task_is_found_before_the_calibration(small: Callable[..., RunConfig]) -> None:
    config = small(evaluation={"tasks": {"names": ["nowhere.jsonl"]}})
    with pytest.raises(TextError, match=r"task file nowhere.jsonl cannot be read"):
        quiet_run(config)
    assert not (config.output_dir / "statistics.safetensors").exists()
    with pytest.raises(TextError, match=r"task file nowhere.jsonl cannot be read"):
        dry_run(config, Console(quiet=True))


def test_a_dry_run_counts_the_questions(small: Callable[..., RunConfig], questions: Path) -> None:
    console = Console(record=True, width=200)
    dry_run(small(evaluation={"tasks": {"names": [str(questions)], "limit": 2}}), console)
    told = " ".join(console.export_text().split())
    assert f"5 models x 2 questions of {questions}, about" in told and "unknown" not in told


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"tasks": {"limit": 3}}, "evaluation.tasks.limit: would do nothing without tasks.names"),
        ({"tasks": {"num_fewshot": 3}}, "evaluation.tasks.num_fewshot: would do nothing without tasks.names"),
        ({"tasks": {"batch_size": 3}}, "evaluation.tasks.batch_size: would do nothing without tasks.names"),
        ({"enabled": False, "tasks": {"names": ["piqa"]}}, "would not run: evaluation.enabled is false"),
        ({"tasks": {"names": ["piqa", "piqa"]}}, "piqa"),
        ({"tasks": {"name": ["piqa"]}}, "names"),
    ],
)
def test_keys_that_would_do_nothing(small: Callable[..., RunConfig], evaluation: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(evaluation=evaluation)
