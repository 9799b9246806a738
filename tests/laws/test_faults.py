"""More than 100 faults at random points: results are those of an unbroken run, bit for bit, or the damage is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints import write_documents, write_texts
from injection import Faults, all_faults
from injection_files import can_mount
from injection_ranks import SharedRun, all_shared_faults
from injection_work import Work

COMMANDS = [
    ("run", 4, 5),
    ("prune", 4, 5),
    ("streamed run", 2, 2),
    ("score", 2, 3),
    ("sweep", 2, 2),
    ("sparsify", 1, 1),
    ("answer", 1, 1),
    ("place", 2, 2),
    ("relufy", 1, 1),
]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A folder of texts."""
    texts = tmp_path / "texts"
    texts.mkdir()
    write_documents(texts)
    return write_texts(texts)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "times", "kills"), COMMANDS)
def test_faults_at_random_points(tmp_path: Path, prepared: Path, command: str, times: int, kills: int) -> None:
    work = Work(command, tmp_path / "root")
    work.prepare(prepared)
    made = all_faults(work, seed=20, kills=kills, times=times)
    assert sum(made.table.values()) == 6 * times + 2 + kills + (times if work.is_run else 0)
    assert sum(n for (_, fault, _), n in made.table.items() if fault.startswith("kill -9")) == kills


@pytest.mark.slow
def test_faults_of_a_run_that_two_processes_share(tmp_path: Path, prepared: Path) -> None:
    work = SharedRun("run of 2 processes", tmp_path / "root")
    work.prepare(prepared)
    made = all_shared_faults(work, seed=20, kills=3, times=2)
    assert sum(made.table.values()) == 3 + 2 * 2 + 3


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prune", "run", "score", "streamed run", "sweep"])
def test_file_systems_that_are_too_small(tmp_path: Path, prepared: Path, command: str) -> None:
    if not can_mount(tmp_path):
        pytest.skip("this process may not mount a file system; limits on the length of files stand for full disks")
    work = Work(command, tmp_path / "root")
    work.prepare(prepared)
    made = Faults(work, seed=20)
    for _ in range(3):
        made.small_disk()
    assert list(made.table.values()) == [3]
