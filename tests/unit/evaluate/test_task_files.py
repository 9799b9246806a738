from __future__ import annotations

import json
from pathlib import Path

import pytest

from ffnscope.errors import TextError
from ffnscope.evaluate.task_files import task_config

CHOICES = {"query": "one and one is", "choices": ["two", "three"], "answer": 0}


def written(tmp_path: Path, *rows: object, name: str = "mine.jsonl") -> Path:
    path = tmp_path / name
    text = json.dumps(list(rows)) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    path.write_text(text + "\n")
    return path


@pytest.mark.parametrize("name", ["mine.json", "mine.jsonl"])
def test_a_file_of_choices(tmp_path, name):
    config = task_config(written(tmp_path, CHOICES, {**CHOICES, "answer": 1, "source": "a book"}, name=name))
    assert config["task"] == "mine" and config["output_type"] == "multiple_choice"
    assert [m["metric"] for m in config["metric_list"]] == ["acc", "acc_norm"]
    assert config["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / name)}}


def test_files_of_targets_and_of_texts(tmp_path):
    assert task_config(written(tmp_path, {"query": "a", "target": " b"}))["output_type"] == "loglikelihood"
    assert task_config(written(tmp_path, {"text": "a b"}))["output_type"] == "loglikelihood_rolling"


def test_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"\n{json.dumps({'text': 'a b'})}\n\n")
    assert task_config(path)["task"] == "mine"


def test_only_line_feeds_end_lines(tmp_path):
    """JSON texts may hold the line and paragraph separators of Unicode as they are."""
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "one\u2028two\u2029three\x85"}\r\n{"text": "four"}\r\n', encoding="utf-8", newline="")
    assert task_config(path)["task"] == "mine"


def test_the_place_of_a_wrong_row_is_told(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "a b"}\n\n{"answer": 1}\n')
    with pytest.raises(TextError, match=r"mine\.jsonl, line 3: expected"):
        task_config(path)
    with pytest.raises(TextError, match=r"mine\.json, row 2: expected"):
        task_config(written(tmp_path, {"text": "a b"}, {"answer": 1}, name="mine.json"))


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({}, "line 1: expected .*; found dict"),
        ("a text", "line 1: expected .*; found str"),
        ({"query": "a"}, "found 'query'"),
        ({"query": "a", "choices": ["b"], "answer": 0}, "found 'query', 'choices', 'answer'"),
        ({"text": "  "}, "found 'text'"),
        ({"text": "a", "query": "b"}, "found 'text', 'query'"),
        ({"query": "a", "choices": ["b", "c"], "answer": 2}, "index of one of them, 0 to 1; got answer 2"),
        ({"query": "a", "choices": ["b", "c"], "answer": "b"}, "got answer 'b'"),
        ({"query": "a", "choices": ["b", "c"], "answer": True}, "got answer True"),
        ({"query": "a", "choices": ["b", 3], "answer": 0}, "'choices' must be texts"),
    ],
)
def test_a_row_of_another_form_is_told(tmp_path, row, found):
    with pytest.raises(TextError, match=found):
        task_config(written(tmp_path, row))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(TextError, match=r"none.jsonl cannot be read"):
        task_config(tmp_path / "none.jsonl")
    with pytest.raises(TextError, match="holds no row; expected rows with 'query'"):
        task_config(written(tmp_path))
    with pytest.raises(TextError, match="mixes rows of 2 forms"):
        task_config(written(tmp_path, CHOICES, {"text": "a"}))
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(TextError, match=r"damaged.jsonl, line 2 is not JSON"):
        task_config(damaged)
    one = tmp_path / "one.json"
    one.write_text('{"text": "a"}')
    with pytest.raises(TextError, match="expected a list of rows; got dict"):
        task_config(one)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match="cannot be read"):
        task_config(binary)
