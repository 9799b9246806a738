"""`ffnscope run` with a sweep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml
from click.testing import Result

from runs import merged, small_run


def test_a_sweep_from_the_command_line(
    ok: Callable[..., Result], fails: Callable[..., str], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    small = {"metrics": {"scar": {"enabled": False}}, "evaluation": {"samples": {"enabled": False}}}
    small = merged(small, {"pruning": {"algorithms": ["wanda"]}})
    sweep = {"calibration.seed": [0, 1]}
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({**small_run(checkpoint, texts, tmp_path / "out", **small), "sweep": sweep}))
    assert "2 of 2 cells to run" in ok("run", file, "--dry-run").stdout
    assert not (tmp_path / "out").exists()
    shown = ok("run", file).stdout
    assert "seed=1" in shown and "Over seeds" in shown and "finished" in shown
    odd = f"sweep.cells=[{{model.model_id: {tmp_path / 'none'}}}]"
    told = fails(1, "run", file, "--set", odd)
    assert "error: 1 of 3 cells failed" in told and "none does not exist" in told
    assert "2 problems" in fails(2, "run", file, "--set", "sweep.calibration.seed=[0, a, b]")
