"""A tiny checkpoint, two short texts, and two ways to call the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from checkpoints import make_checkpoint, write_texts
from ffnscope.cli import app, channels, main


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal wide enough for every table."""
    monkeypatch.setattr(channels.OUT, "width", 240)
    monkeypatch.setenv("COLUMNS", "240")  # of the help texts


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def ok() -> Callable[..., Result]:
    """Call a command that must succeed."""

    def call(*arguments: Any) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result

    return call


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call the program as a shell would; it must end with ``status``. Returns what it wrote to standard error."""

    def call(status: int, *arguments: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["ffnscope", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        written = capsys.readouterr().err
        assert end.value.code == status, written
        return written

    return call
