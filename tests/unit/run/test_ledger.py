"""The record of finished stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from ffnscope.errors import ArtifactError
from ffnscope.run.folder import differing, write_if_changed
from ffnscope.run.ledger import Ledger


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """A folder in which a stage made two files."""
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    Ledger(tmp_path).record("stage", "key", [tmp_path / "a", tmp_path / "b"], {"seconds": 1.0})
    return tmp_path


def test_other_inputs_are_told_before_a_stage_is_done_and_refused_after(tmp_path: Path) -> None:
    assert Ledger(tmp_path).accept({"the model": "m", "the text": "1"}, overwrite=False) == []
    assert Ledger(tmp_path).accept({"the model": "m", "the text": "2"}, overwrite=False) == ["the text"]
    ledger = Ledger(tmp_path)
    ledger.record("stage", "key", [], {})
    assert ledger.accept({"the model": "m", "the text": "2"}, overwrite=False) == []
    with pytest.raises(ArtifactError, match=r"changed since they were made: the text \(hash 2, now 3\).*--overwrite"):
        Ledger(tmp_path).accept({"the model": "m", "the text": "3"}, overwrite=False)
    assert Ledger(tmp_path).inputs["the text"] == "2"
    assert Ledger(tmp_path).accept({"the model": "m", "the text": "3"}, overwrite=True) == ["the text"]


def test_current_means_same_key_and_same_bytes(done: Path) -> None:
    assert Ledger(done).current("stage", "key")
    assert not Ledger(done).current("stage", "other")
    assert not Ledger(done).current("other", "key")
    (done / "b").write_text("B")
    assert not Ledger(done).current("stage", "key")
    (done / "b").unlink()
    assert not Ledger(done).current("stage", "key")


def test_a_stage_without_files_is_recorded(tmp_path: Path) -> None:
    Ledger(tmp_path).record("report", "key", [], {})
    assert Ledger(tmp_path).current("report", "key")


def test_begin_keeps_only_whole_files_that_are_made_again(done: Path) -> None:
    (done / "b").write_text("damaged")
    Ledger(done).begin("stage", [done / "a", done / "b"])
    assert (done / "a").exists()
    assert not (done / "b").exists()
    assert Ledger(done).stages == {}


def test_begin_deletes_what_is_not_made_any_more(done: Path) -> None:
    Ledger(done).begin("stage", [done / "a"])
    assert not (done / "b").exists()


def test_keep_forgets_the_others(done: Path) -> None:
    ledger = Ledger(done)
    ledger.record("kept", "key", [], {})
    ledger.keep({"kept": 1})
    assert list(Ledger(done).stages) == ["kept"]
    assert not (done / "a").exists()


def test_a_stage_must_have_made_its_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="stage score did not write x in"):
        Ledger(tmp_path).record("score", "key", [tmp_path / "x"], {})


def test_differing_names_keys() -> None:
    old = {"a": {"b": 1, "c": [1]}, "output": {"dir": "x", "plots": True}}
    assert differing(old, {"a": {"b": 2, "c": [1]}, "output": {"dir": "y", "plots": True}}) == ["a.b"]
    assert differing(old, {"a": {"c": [1]}, "d": 0, "output": {"dir": "x", "plots": False}}) == [
        "a.b",
        "output.plots",
        "d",
    ]
    assert differing(None, old) == ["everything"]


def test_write_if_changed(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_if_changed(path, {"a": 1})
    before = path.stat().st_mtime_ns
    write_if_changed(path, {"a": 1})
    assert path.stat().st_mtime_ns == before
    path.write_text("{")
    write_if_changed(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'
