"""An interrupted call that goes on with another model or text says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from ffnscope.cli import channels, curves, validate
from ffnscope.cli.files import INPUTS
from ffnscope.io import write_state

SMALL = ("--num-samples", 4, "--max-length", 32, "--batch-size", 2, "--device", "cpu")
SAMPLE = ("--channels", 4, "--sites", 2, "--held-out-samples", 2)
COMMANDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "curves": (("curves", "--curve-samples", 2), curves.UNFINISHED),
    "score": (("score", "-m", "wanda"), channels.UNFINISHED),
    "validate": (("rank", "--validate", "-m", "wanda", *SAMPLE), validate.UNFINISHED),
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_it_is_told(command: str, checkpoint: Path, texts: Path, tmp_path: Path, ok: Callable[..., Result]) -> None:
    (name, *options), unfinished = COMMANDS[command]
    out = tmp_path / "out"
    write_state(out / unfinished / INPUTS, {"the model": "another", "the calibration text": "another"})
    half = out / f".scores.json.{'0' * 32}.tmp"
    half.write_text("{")
    text = ["--text", texts / "train.txt"]
    text += ["--held-out", texts / "test.txt"] if command == "validate" else []
    result = ok(name, checkpoint, *options, "--out", out, *text, *SMALL)
    assert "changed since the interrupted call: the model, the calibration text" in result.stderr
    assert not half.exists()
    assert not (out / unfinished).exists()
