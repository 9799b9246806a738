"""Commands that were broken off while they wrote: the same call again completes them, or says what lies there."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result

from checkpoints import make_checkpoint
from ffnscope.apply.folder import refuse_existing
from ffnscope.cli import files
from ffnscope.cli import score as score_module
from ffnscope.errors import ArtifactError
from ffnscope.saving import replacing
from ffnscope.sparse.relu import convert

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


BUDGET = ("--budget", 2000, "--fast-bandwidth", 100, "--slow-bandwidth", 10, "--sync", 0)
TRAINING = ("--steps", 2, "--measure-every", 1, "--max-length", 32, "--num-samples", 16, "--held-out-samples", 2)
COMMANDS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "prune": (files, ("--sparsity", 0.5, "-m", "magnitude", "--no-evaluate", *SMALL)),
    "place": (files, (*BUDGET, "--num-samples", 24, "--max-length", 24)),
    "relufy": (convert, (*TRAINING, "--no-shift", "--device", "cpu")),
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_refusal_of_a_finished_output_names_the_working_folder(
    ok: Ok, fails: Fails, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Cut off when the output had its name, and before the folder beside it was removed."""
    module, options = COMMANDS[command]
    model = make_checkpoint(tmp_path / "relu", "llama_relu") if command == "place" else checkpoint
    out = tmp_path / "made" / ("out.json" if command == "place" else "out")
    asked = (command, model, "--out", out, *options)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "shutil", SimpleNamespace(rmtree=interrupt))
        fails(130, *asked)
    left = f".{out.name}.{command}.part"
    assert {path.name for path in out.parent.iterdir()} == {out.name, left}
    assert f"Beside it lies {left}, of a call that did not end; delete it unless" in fails(1, *asked)
    ok(*asked, "--overwrite")
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert "Beside it" not in fails(1, *asked)


def test_only_working_folders_of_this_output_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in (".out.b.prune.part", ".other.prune.part", "out.part", ".out.part", ".out.place.part"):
        (tmp_path / name / "state").mkdir(parents=True)
    (tmp_path / ".out.relufy.part").mkdir()  # empty: nothing that could be lost, or of a call that has just begun
    told = "Choose another output, or pass --overwrite to replace it. Beside it lies .out.place.part, of a call"
    with pytest.raises(ArtifactError, match=re.escape(told)):
        refuse_existing(out, overwrite=False)
    refuse_existing(out, overwrite=True)
    refuse_existing(tmp_path / "new", overwrite=False)
