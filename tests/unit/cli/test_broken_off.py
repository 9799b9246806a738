"""Commands that were broken off while they wrote: the same call again completes them, or says what lies there."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from ffnscope.cli import score as score_module
from ffnscope.saving import replacing

Ok = Callable[..., Result]
Fails = Callable[..., str]
SMALL = ("--num-samples", 4, "--max-length", 32, "--batch-size", 2, "--device", "cpu")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
def test_score_goes_on_when_some_of_its_files_are_there(
    ok: Ok,
    fails: Fails,
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
) -> None:
    """By a metric of weights alone no pass leaves sums: what tells of the interrupt is what is missing."""
    out, status = tmp_path / "out", 130 if isinstance(fault, KeyboardInterrupt) else 1
    options = ("score", checkpoint, "-m", "magnitude", "--text", texts / "train.txt", *SMALL, "--out")

    def full(path: Path, value: Any) -> None:
        with replacing(path):
            raise fault

    for _ in range(2):  # the second call has something to go on from, and is cut off as well
        with monkeypatch.context() as patch:
            patch.setattr(score_module, "write_json", full)
            fails(status, *options, out)
        assert {path.name for path in out.iterdir()} == {"scores.safetensors", "statistics.safetensors", "score.part"}
    ok(*options, out)
    ok(*options, tmp_path / "whole")
    assert files_of(out) == files_of(tmp_path / "whole")


def test_an_output_of_which_nothing_was_replaced_is_still_finished(
    ok: Ok, fails: Fails, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("score", checkpoint, "-m", "magnitude", "--text", texts / "train.txt", *SMALL, "--out", tmp_path / "out")
    ok(*options)
    finished = files_of(tmp_path / "out")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(score_module, "score_all", interrupt)
        fails(130, *options, "--overwrite")
    assert files_of(tmp_path / "out") == finished
    assert "already exists" in fails(1, *options)
