"""80 faults at random points: the results are those of an unbroken run, bit for bit, or the damage is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints import write_texts
from injection import Work, all_faults


@pytest.mark.slow
@pytest.mark.parametrize(("command", "times", "kills"), [("run", 4, 5), ("prune", 4, 5), ("streamed run", 2, 2)])
def test_faults_at_random_points(tmp_path: Path, command: str, times: int, kills: int) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    work = Work(command, tmp_path / "root")
    work.prepare(write_texts(texts))
    made = all_faults(work, seed=20, kills=kills, times=times)
    assert sum(made.table.values()) == 6 * times + 2 + kills + (times if work.is_run else 0)
    assert sum(n for (_, fault, _), n in made.table.items() if fault.startswith("kill -9")) == kills
