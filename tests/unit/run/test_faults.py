"""Five faults of a run, and two of a pruning; tests/laws/test_faults.py makes many more."""

from __future__ import annotations

from pathlib import Path

from injection import Faults, Work


def test_a_run(tmp_path: Path, texts: Path) -> None:
    work = Work("run", tmp_path / "root")
    work.prepare(texts)
    made = Faults(work, seed=1)
    for kind in ("interrupt", "death", "full disk"):
        made.stopped(kind)
    made.damaged("bit flipped")
    made.damaged("truncated", finished=True)
    assert sum(made.table.values()) == 5


def test_a_pruning(tmp_path: Path, texts: Path) -> None:
    work = Work("prune", tmp_path / "root")
    work.prepare(texts)
    made = Faults(work, seed=2)
    made.stopped("death")
    made.damaged("bit flipped")
    assert sum(made.table.values()) == 2
