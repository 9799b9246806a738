"""The peak memory that a dry run tells holds a model once, and the libraries as they are before it is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result

from checkpoints import write_documents
from ffnscope.cli import options
from ffnscope.run import estimate
from runs import small_run

GIB = 2**30


def resident() -> int:
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmRSS"].split()[0]) * 1024


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let every model take 256 MiB more than it says; what the process takes before each is loaded."""
    before: list[int] = []
    weights: list[torch.Tensor] = []

    def wrapped(load: Callable[..., Any]) -> Callable[..., Any]:
        def loading(source: Any) -> Any:
            before.append(resident())
            weights.append(torch.ones(2**26))
            return load(source)

        return loading

    for place in (options, estimate):
        monkeypatch.setattr(place, "load_to_estimate", wrapped(place.load_to_estimate))
    monkeypatch.setattr(options, "load_model", wrapped(options.load_model))
    return before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell what a process takes")
@pytest.mark.parametrize("command", ["prune", "score", "rank", "relufy", "run", "curves", "sparsify"])
def test_a_model_is_counted_once(
    checkpoint: Path, texts: Path, tmp_path: Path, ok: Callable[..., Result], large: list[int], command: str
) -> None:
    text = ("--text", texts / "train.txt", "--num-samples", 12, "--max-length", 16)
    given: dict[str, tuple[Any, ...]] = {
        "prune": (checkpoint, *text, "--no-evaluate", "--sparsity", 0.5, "--out", tmp_path / "out"),
        "score": (checkpoint, *text, "-m", "wanda", "--out", tmp_path / "out"),
        "rank": (checkpoint, "--validate", *text, "-m", "wanda", "--held-out", texts / "test.txt"),
        "relufy": (checkpoint, "--max-length", 16, "--steps", 2, "--held-out-samples", 2, "--out", tmp_path / "out"),
        "run": (tmp_path / "run.yaml",),
        "curves": (checkpoint, *text, "-m", "wanda", "--out", tmp_path / "out"),
        "sparsify": (checkpoint, *text[:1], tmp_path / "train.jsonl", *text[2:], "--out", tmp_path / "out"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small_run(checkpoint, texts, tmp_path / "out")))
    write_documents(tmp_path)
    told = ok(command, *given[command], "--dry-run").stdout
    (peak,) = re.findall(r"peak memory about ([\d.]+) GiB", told)
    assert float(peak) == pytest.approx(large[0] / GIB, abs=0.15)


def test_cells_of_a_sweep_do_not_count_each_other(
    checkpoint: Path, texts: Path, tmp_path: Path, ok: Callable[..., Result], large: list[int]
) -> None:
    base = small_run(checkpoint, texts, tmp_path / "out")
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**base, "sweep": {"calibration.seed": [0, 1, 2]}}))
    told = ok("run", tmp_path / "sweep.yaml", "--dry-run").stdout
    peaks = re.findall(r"seed=\d.*?([\d.]+) GiB", told)
    assert len(peaks) == len(large) == 3 and len(set(peaks)) == 1
    assert float(peaks[0]) == pytest.approx(large[0] / GIB, abs=0.15)
