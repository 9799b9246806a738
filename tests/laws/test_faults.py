"""60 faults at random points: the results are those of an unbroken run, bit for bit, or the damage is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints import write_texts
from injection import Work, all_faults


@pytest.mark.slow
@pytest.mark.parametrize(("command", "at_least"), [("run", 32), ("prune", 28)])
def test_faults_at_random_points(tmp_path: Path, command: str, at_least: int) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    work = Work(command, tmp_path / "root")
    work.prepare(write_texts(texts))
    made = all_faults(work, seed=20)
    assert sum(made.table.values()) >= at_least
    assert sum(n for (_, fault, _), n in made.table.items() if fault.startswith("kill -9")) == 5
