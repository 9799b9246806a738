"""The command bench."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import ffnscope
from ffnscope.evaluate import throughput
from ffnscope.io import write_plan
from runs import strict_json
from tiny import D_FF, HIDDEN, LAYERS

Ok = Callable[..., Result]
Fails = Callable[..., str]
FAST = ("--prompt-length", 8, "--new-tokens", 2, "--repeats", 2, "--warmup", 0, "--device", "cpu")


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "READ_BYTES", (2**12, 2**13))
    monkeypatch.setattr(throughput, "MATRIX", {"cpu": 16})


@pytest.fixture(scope="module")
def plan(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = ffnscope.load_model(str(checkpoint))
    scores = ffnscope.score(loaded.model, ffnscope.find_sites(loaded.model), "random")
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    write_plan(file, ffnscope.build_plan(scores, 0.5))
    return file


def test_prune_then_bench(ok: Ok, checkpoint: Path, plan: Path, tmp_path: Path) -> None:
    ok("prune", checkpoint, "--plan", plan, "--no-evaluate", "--out", tmp_path / "smaller", "--device", "cpu")
    out = tmp_path / "bench.json"
    text = ok("bench", checkpoint, tmp_path / "smaller", "--threads", 1, "--out", out, *FAST).stdout
    removed = LAYERS * 3 * HIDDEN * D_FF // 2
    assert f"Removed {removed:,} of {2 * removed:,} FFN parameters (50.000 %), exactly as planned." in " ".join(
        text.split()
    )
    found = strict_json(out)
    assert (found["kind"], found["versions"]["ffnscope"]) == ("bench", ffnscope.__version__)
    counts = {"dense": 2 * removed, "found": removed, "planned": removed}
    assert found["removed"] == {**counts, "padded": False, "share": 0.5}
    for model in found["models"].values():
        assert model["peak_bytes"] is None or model["peak_bytes"]["total"] > model["peak_bytes"]["libraries"]


def test_one_model_and_a_plan(ok: Ok, checkpoint: Path, plan: Path) -> None:
    text = ok("bench", checkpoint, "--plan", plan, "--no-memory", *FAST)
    assert "sliced" in text.stdout
    assert "bench:" in text.stderr


def test_refusals(fails: Fails, checkpoint: Path, plan: Path, tmp_path: Path) -> None:
    run: tuple[Any, ...] = ("bench", checkpoint, "--no-memory", *FAST)
    assert "give a second model (the pruned one), or --plan FILE" in fails(2, *run)
    (tmp_path / "there.json").write_text("{}")
    assert "there.json already exists" in fails(1, *run, "--plan", plan, "--out", tmp_path / "there.json")
    assert "must end in .json" in fails(2, *run, "--plan", plan, "--out", tmp_path / "x.csv")
    assert "does not exist" in fails(1, *run, "--plan", tmp_path / "none.json")
    (tmp_path / "broken.json").write_text('{"kind": "plan", "sites": [')
    assert "cannot be read as JSON" in fails(1, *run, "--plan", tmp_path / "broken.json")
    assert "repeats must be at least 2" in fails(2, "bench", checkpoint, "--plan", plan, "--repeats", 1)
    assert "new_tokens must be at least 1" in fails(2, "bench", checkpoint, "--plan", plan, "--new-tokens", 0)
