"""`ffnscope report` and `ffnscope compare`."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from ffnscope.run import config_from_dict
from runs import quiet_run, small_run


@pytest.fixture(scope="module")
def runs(checkpoint: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    found: list[Path] = []
    for name, seed in (("one", 1), ("two", 2)):
        changes = {"experiment": {"name": name, "seed": seed}, "metrics": {"scar": {"enabled": False}}}
        changes["pruning"] = {"algorithms": ["wanda"]}
        out = tmp_path_factory.mktemp("runs") / name
        found.append(quiet_run(config_from_dict(small_run(checkpoint, texts, out, **changes))).folder)
    return found


def test_a_report_is_made_again(ok: Callable[..., Result], fails: Callable[..., str], runs: list[Path]) -> None:
    ok("report", runs[0])
    first = (runs[0] / "report.html").read_text()
    assert "What was found" in first
    ok("report", runs[0])  # its own page holds nothing that would be lost
    assert (runs[0] / "report.html").read_text() == first
    copy = runs[0].parent / "copy.html"
    ok("report", runs[0], "--out", copy)
    assert "already exists" in fails(1, "report", runs[0], "--out", copy)
    ok("report", runs[0], "--out", copy, "--overwrite")
    assert copy.read_text() == first


def test_several_runs_are_compared(
    ok: Callable[..., Result],
    fails: Callable[..., str],
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ok("report", *runs)
    assert "Comparison of one, two" in (tmp_path / "comparison.html").read_text()
    assert "comparison.html already exists" in fails(1, "report", *runs)
    shown = ok("compare", *runs, "--out", tmp_path / "rows.csv").stdout
    assert "What was asked otherwise" in shown and "experiment.seed" in shown and "two: wanda" in shown
    with (tmp_path / "rows.csv").open() as file:
        assert {row["run"] for row in csv.DictReader(file)} == {"one", "two"}


def test_what_is_refused(fails: Callable[..., str], runs: list[Path], tmp_path: Path) -> None:
    assert "must end in .html" in fails(2, "report", runs[0], "--out", tmp_path / "page.pdf")
    assert "holds no run" in fails(1, "report", tmp_path)
    assert "at least two runs" in fails(2, "compare", runs[0])
    assert "each folder once" in fails(2, "compare", runs[0], runs[0])
