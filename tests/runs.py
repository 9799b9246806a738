"""Small runs: configurations that take a second on a tiny checkpoint, and what to compare of their results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ffnscope.run import RunConfig, RunResult, run
from ffnscope.run.progress import Reporter


def small_run(checkpoint: Path, texts: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Nested mapping of a small run without plots; ``changes`` are merged into it, block by block."""
    base = {
        "experiment": {"device": "cpu"},
        "model": {"model_id": str(checkpoint)},
        "dataset": {"name": str(texts / "train.txt"), "batch_size": 2},
        "calibration": {"num_samples": 6, "max_length": 32, "batch_size": 2, "checkpoint_every": 1},
        "pruning": {"enabled": True, "ratios": [0.25, 0.5], "algorithms": ["random", "scar_loss_proxy"]},
        "evaluation": {
            "name": str(texts / "test.txt"),
            "num_samples": 4,
            "samples": {"prompts": ["The people", "Of"], "max_new_tokens": 3},
        },
        "output": {"dir": str(out), "plots": False, "report": False},
    }
    return merged(base, changes)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; a value that is no mapping replaces the old one."""
    found = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if both else value
    return found


def quiet_run(config: RunConfig, *, overwrite: bool = False) -> RunResult:
    """Run without a word on the terminal."""
    return run(config, overwrite=overwrite, reporter=Reporter(Console(quiet=True)))


def results(folder: Path) -> dict[str, str]:
    """Relative name -> hash of every file of results: not of those that hold timings or the folder's name."""
    left_out = {"run.log", "ledger.json", "summary.json", "experiment_config.yaml"}
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in left_out]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def strict_json(path: Path) -> Any:
    """Read JSON that holds neither NaN nor infinity."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
