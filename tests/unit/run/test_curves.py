"""Runs that measure loss curves, keep floors, or compensate by a bias: stages, files, plots, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import ffnscope
from faults import stop_at
from ffnscope.analyze import curves
from ffnscope.errors import UsageError
from ffnscope.run import config_from_dict
from ffnscope.run.bounds import Load
from ffnscope.run.dry_run import dry_run
from ffnscope.run.estimate import estimate
from runs import quiet_run, results, small_run, strict_json
from tiny import D_FF, HIDDEN, LAYERS

BASE: dict[str, Any] = {"enabled": True, "algorithms": ["magnitude"], "ratios": [0.25, 0.5], "allocator": "measured"}
ROUNDS = {"num_samples": 6, "shares": [0.25, 0.75]}


def config(checkpoint: Path, texts: Path, out: Path, pruning: dict[str, Any], **changes: Any) -> Any:
    asked = small_run(checkpoint, texts, out, calibration={"num_samples": 16}, **changes)
    asked["pruning"] = {**BASE, **pruning}
    asked["metrics"] = {"scar": {"enabled": False}}
    return config_from_dict(asked)


def test_curves_of_every_plan(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    output = {"report": True, "plots": True}
    found = quiet_run(config(checkpoint, texts, tmp_path / "out", {"curves": ROUNDS}, output=output))
    kept = {path.name for path in (found.folder / "curves").iterdir()}
    names = ("magnitude", "magnitude-0.25_2", "magnitude-0.5_2")
    assert kept == {f"{name}.{suffix}" for name in names for suffix in ("safetensors", "csv")}
    first = ffnscope.read_curves(found.folder / "curves" / "magnitude.safetensors")
    assert [w.tolist() for w, _ in first.points.values()] == [[D_FF // 4, 3 * D_FF // 4]] * LAYERS
    second = ffnscope.read_curves(found.folder / "curves" / "magnitude-0.5_2.safetensors")
    assert second.facts["around"] == 0.5
    plan = found.plans["magnitude-0.5"]
    assert (plan.allocator, plan.sparsity) == ("measured", 0.5)
    expected = ffnscope.build_plan(found.scores["magnitude"], 0.5, "measured", curves=second)
    assert plan.widths == expected.widths
    rows = strict_json(found.folder / "analysis" / "curves.json")["rows"]
    assert {row["label"] for row in rows} == set(found.plans)
    assert {r["chosen"] for r in rows if r["label"] == "magnitude-0.5"} == set(plan.widths.values())
    assert {p.name for p in (found.folder / "plots").glob("curves_*")} == {f"curves_{one}.png" for one in found.plans}
    page = (found.folder / "report.html").read_text()
    assert "Where the widths come from" in page and "rise of the KL, nats per token" in page


def test_refitted_curves_read_the_one_pass(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    asked = {"ratios": [0.5], "reconstruct": "sequential", "curves": {**ROUNDS, "rounds": 1}}
    found = quiet_run(config(checkpoint, texts, tmp_path / "out", asked))
    stats, _ = ffnscope.read_stats(found.folder / "statistics.safetensors")
    assert set(next(iter(stats.values())).values) == {"h_outer"}
    one = ffnscope.read_curves(found.folder / "curves" / "magnitude.safetensors")
    assert one.facts["refitted"] is True and one.facts["tokens"] == 6 * 31
    assert [row.metric for row in found.rows] == [None, "magnitude + sequential refit"]


def test_an_interrupted_run_goes_on_and_only_what_changed_is_done_again(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = quiet_run(config(checkpoint, texts, tmp_path / "unbroken", {"curves": ROUNDS}))
    asked = config(checkpoint, texts, tmp_path / "out", {"curves": ROUNDS})
    with monkeypatch.context() as patch:
        patch.setattr(curves, "SAVED_SECONDS", -1.0)
        stop_at(patch, curves._Run, "measure", LAYERS + 2)
        with pytest.raises(KeyboardInterrupt):
            quiet_run(asked)
    assert (tmp_path / "out" / "curves" / "magnitude.part.json").exists()
    with monkeypatch.context() as patch:
        calls = stop_at(patch, curves._Run, "measure", 0)
        found = quiet_run(asked)
    assert len(calls) == 3 * 3 * LAYERS - (LAYERS + 1)  # three rounds of three batches
    assert not list((tmp_path / "out" / "curves").glob("*.part*"))
    assert results(found.folder) == results(unbroken.folder)
    with monkeypatch.context() as patch:
        calls = stop_at(patch, curves._Run, "measure", 0)
        quiet_run(asked)
        assert not calls
        other = config(checkpoint, texts, tmp_path / "out", {"curves": ROUNDS, "ratios": [0.25, 0.75]})
        quiet_run(other, overwrite=True)
    assert len(calls) == 3 * LAYERS  # the second round of the new sparsity
    assert not (tmp_path / "out" / "curves" / "magnitude-0.5_2.csv").exists()


def test_floors(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    floors = {"*.0.mlp": 0.75, "*": 3}
    found = quiet_run(config(checkpoint, texts, tmp_path / "out", {"min_keep": floors, "curves": ROUNDS}))
    for label, sparsity in (("magnitude-0.25", 0.25), ("magnitude-0.5", 0.5)):
        plan = found.plans[label]
        assert plan.sparsity == sparsity and plan.budget.min_keep == floors
        widths = list(plan.widths.values())
        assert widths[0] >= 0.75 * D_FF and min(widths) >= 3


@pytest.mark.parametrize(
    ("min_keep", "message"),
    [
        (0.9, "a sparsity of 0.25 leaves"),
        ({"model.layers.9.mlp": 0.5}, "min_keep names 'model.layers.9.mlp', which is no FFN"),
    ],
)
def test_floors_are_checked_before_any_work(
    checkpoint: Path, texts: Path, tmp_path: Path, min_keep: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        quiet_run(config(checkpoint, texts, tmp_path / "out", {"min_keep": min_keep}))
    assert not (tmp_path / "out" / "statistics.safetensors").exists()


def test_the_dry_run_tells_cuts(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=240)
    dry_run(config(checkpoint, texts, tmp_path / "out", {"curves": ROUNDS}), console)
    told = console.export_text()
    assert f"{LAYERS * (2 + 4)} cuts in 2 round(s) x 192 tokens" in told
    assert "the first round for 1 metric(s), the others for 2 plan(s)" in told


def test_the_dry_run_tells_the_memory_of_curves(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    """The statistics; with a refit also the kept columns, and four matrices of a solve."""
    plain, fitted, local = (
        estimate(config(checkpoint, texts, tmp_path / "out", {"curves": ROUNDS, "ratios": [0.5], **changes}))
        for changes in ({}, {"reconstruct": "one_shot"}, {"allocator": "local", "curves": {}})
    )
    assert plain.bounds.work.curves == fitted.bounds.work.curves == Load(6 * 32, 32, 2)
    assert plain.bounds.work.columns == plain.calibration.disk
    columns = 4 * LAYERS * HIDDEN * D_FF * 2  # of a quarter, three quarters and a whole solution
    solve = 4 * 8 * (D_FF**2 + HIDDEN * D_FF)
    assert fitted.bounds.work.columns == fitted.calibration.disk + columns + solve
    assert "curves" in plain.bounds.stages and "curves" not in local.bounds.stages


def test_bias(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    asked = {"allocator": "local", "ratios": [0.5], "reconstruct": "bias"}
    found = quiet_run(config(checkpoint, texts, tmp_path / "out", asked, output={"checkpoints": True}))
    assert [row.metric for row in found.rows] == [None, "magnitude + mean bias"]
    stats, _ = ffnscope.read_stats(found.folder / "statistics.safetensors")
    loaded = ffnscope.load_model(ffnscope.ModelSource(str(checkpoint), device="cpu"))
    expected = ffnscope.compensate_bias(loaded.model, found.plans["magnitude-0.5"], stats)
    for site, bias in found.reconstructions["magnitude-0.5"].bias.items():
        assert torch.equal(bias, expected.bias[site]) and float(bias.abs().max()) > 0
    saved = ffnscope.load_model(ffnscope.ModelSource(str(found.folder / "checkpoints" / "magnitude-0.5"), device="cpu"))
    assert saved.model.config.mlp_bias is True
    text = ffnscope.TextSource(str(texts / "test.txt"))
    after = ffnscope.perplexity(saved.model, ffnscope.load_windows(text, saved.tokenizer, n=4, length=32, seed=42))
    assert after.value == pytest.approx(found.rows[1].results[0].value, rel=1e-5)
