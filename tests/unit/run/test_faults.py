"""Five faults of a run, and two of a pruning; tests/laws/test_faults.py makes many more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ffnscope.errors import ArtifactError
from ffnscope.run import RunConfig
from injection import Faults
from injection_work import Work
from runs import quiet_run


def test_a_run(tmp_path: Path, texts: Path) -> None:
    work = Work("run", tmp_path / "root")
    work.prepare(texts)
    made = Faults(work, seed=1)
    for kind in ("interrupt", "death", "full disk"):
        made.stopped(kind)
    made.damaged("bit flipped")
    made.damaged("truncated", finished=True)
    assert sum(made.table.values()) == 5


def test_a_kill_while_the_configuration_is_written(small: Callable[..., RunConfig]) -> None:
    config = small()
    config.output_dir.mkdir()
    (config.output_dir / f".experiment_config.yaml.{'0' * 32}.tmp").write_text("experi")
    assert quiet_run(config).scores
    assert not list(config.output_dir.glob(".*"))
    other = config.output_dir.with_name("other")
    other.mkdir()
    (other / ".mine.tmp").touch()
    with pytest.raises(ArtifactError, match="is not a run of ffnscope"):
        quiet_run(small(output={"dir": str(other)}))


def test_a_pruning(tmp_path: Path, texts: Path) -> None:
    work = Work("prune", tmp_path / "root")
    work.prepare(texts)
    made = Faults(work, seed=2)
    made.stopped("death")
    made.damaged("bit flipped")
    assert sum(made.table.values()) == 2
