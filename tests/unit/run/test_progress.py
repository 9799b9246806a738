"""What is told on a terminal, in a file, and in the log."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from ffnscope.errors import ArtifactError
from ffnscope.run import progress
from ffnscope.run.progress import Reporter, logging_to, peak_memory


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the reporter sees: ``clock[0]``."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def reporter(terminal: bool = False) -> tuple[Reporter, io.StringIO]:
    text = io.StringIO()
    return Reporter(Console(file=text, width=100, force_terminal=terminal)), text


def test_lines_in_a_file_are_rare_and_tell_rate_and_time_left(clock: list[float]) -> None:
    told, text = reporter()
    with told.task("calibrate", "tokens") as update:
        for seconds in range(1, 41):
            clock[0] = seconds
            update(100 * seconds, 4000)
    assert text.getvalue().splitlines() == [
        "calibrate: 1,500 of 4,000 tokens, about 25 s left",
        "calibrate: 3,000 of 4,000 tokens, about 10 s left",
        "calibrate: 40.0 s, 100 tokens/s",
    ]


def test_what_an_earlier_process_did_is_not_counted_as_fast(clock: list[float]) -> None:
    told, text = reporter()
    with told.task("calibrate", "tokens") as update:
        for seconds in range(1, 17):
            clock[0] = seconds
            update(90_000 + 100 * seconds, 100_000)
    assert text.getvalue().splitlines() == [
        "calibrate: 91,500 of 100,000 tokens, about 85 s left",
        "calibrate: 16.0 s, 100 tokens/s",
    ]


def test_no_rate_without_two_points(clock: list[float]) -> None:
    told, text = reporter()
    with told.task("load m", "models"):
        clock[0] = 3.0
    with told.task("plots", "files") as update:
        clock[0] = 20.0
        update(4, 4)
    assert text.getvalue().splitlines() == ["load m: 3.0 s", "plots: 4 of 4 files", "plots: 17.0 s"]


def test_a_terminal_gets_a_bar() -> None:
    told, text = reporter(terminal=True)
    with told.task("evaluate on [text]", "tokens") as update:
        update(10, 40)
        update(20, 40)
    shown = text.getvalue()
    assert "evaluate on [text]" in shown
    assert "50%" in shown
    assert "tokens/s" in shown


def test_long_lines_and_markup_stay_as_they_are() -> None:
    told, text = reporter()
    line = "results in /a/[bold]/" + "x" * 200
    told.say(line)
    assert text.getvalue() == line + "\n"


def test_log_has_what_is_said_warned_and_what_stopped_it(tmp_path: Path) -> None:
    told, _ = reporter()
    with pytest.raises(ArtifactError), logging_to(tmp_path / "run.log"):
        told.say("100 % done")
        logging.getLogger("some.library").warning("careful")
        logging.getLogger("some.library").info("chatter")
        raise ArtifactError("the disk is full")
    rows = [line.split(" ", 2)[2] for line in (tmp_path / "run.log").read_text().splitlines()]
    assert rows == [
        "INFO ffnscope.run: 100 % done",
        "WARNING some.library: careful",
        "ERROR ffnscope.run: stopped by ArtifactError: the disk is full",
    ]


def test_log_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot write .*run\.log"), logging_to(tmp_path / "no" / "run.log"):
        pass


def test_peak_memory_is_in_bytes() -> None:
    assert 10 * 2**20 < peak_memory()["resident"] < 2**40
