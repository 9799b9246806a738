"""Measured allocation on the command line: curves that are kept, a second round, resuming, the dry run, refusals."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import ffnscope
from faults import stop_at
from ffnscope.analyze import curves
from ffnscope.calibrate import passes as calibrating
from ffnscope.cli import app, files, prune_estimate
from ffnscope.io import read_plan
from ffnscope.run.lines import duration
from tiny import D_FF, LAYERS

Ok = Callable[..., Result]
Fails = Callable[..., str]
SMALL = ("--num-samples", 16, "--max-length", 32, "--batch-size", 4, "--device", "cpu")
MEASURED = ("-m", "magnitude", "--allocator", "measured", "--curve-samples", 6)


@pytest.fixture
def text(checkpoint: Path, texts: Path) -> tuple[Any, ...]:
    return (checkpoint, "--text", texts / "train.txt", *SMALL)


@pytest.fixture
def pruning(text: tuple[Any, ...], tmp_path: Path) -> tuple[Any, ...]:
    return ("prune", *text, "--out", tmp_path / "out", "--sparsity", 0.5, "--no-evaluate")


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def model_of(checkpoint: Path) -> Any:
    return ffnscope.load_model(ffnscope.ModelSource(str(checkpoint), device="cpu"))


def test_prune_measures_twice_and_keeps_the_curves(
    ok: Ok, pruning: tuple[Any, ...], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    result = ok(*pruning, *MEASURED)
    assert "measure curves: " in result.stderr and "measure curves around the solution: " in result.stderr
    assert "cuts/s" in result.stderr and "ffnscope_curves_2.csv" in result.stderr
    out = tmp_path / "out"
    names = {path.name for path in out.glob("ffnscope_curves*")}
    assert names == {f"ffnscope_curves_{i}.{suffix}" for i in (1, 2) for suffix in ("safetensors", "csv", "png")}
    plan = read_plan(out / "ffnscope_plan.json")
    assert (plan.allocator, plan.sparsity) == ("measured", 0.5)
    loaded = model_of(checkpoint)
    source = ffnscope.TextSource(str(texts / "train.txt"))
    windows = ffnscope.load_windows(source, loaded.tokenizer, n=16, length=32, seed=42)
    asked = ffnscope.CurveRounds(num_samples=6)
    scores = ffnscope.score(loaded.model, ffnscope.find_sites(loaded.model), "magnitude")
    expected, found = ffnscope.plan_by_curves(loaded.model, scores, None, asked.windows(windows), 0.5, rounds=asked)
    assert plan.widths == expected.widths
    for i, one in enumerate(found, 1):
        kept = ffnscope.read_curves(out / f"ffnscope_curves_{i}.safetensors")
        assert kept.facts["model"] == ffnscope.weights_hash(loaded.model)
        for site, (widths, rises) in one.points.items():
            assert torch.equal(kept.points[site][0], widths)
            assert torch.allclose(kept.points[site][1], rises, rtol=1e-3, atol=1e-7)
    assert "around" not in found[0].facts and found[1].facts["around"] == 0.5
    rows = table(out / "ffnscope_curves_2.csv")
    assert {int(row["chosen"]) for row in rows} == set(plan.widths.values())
    assert len(rows) == sum(len(widths) for widths, _ in found[1].points.values())
    assert ffnscope.load_model(ffnscope.ModelSource(str(out), device="cpu")).model is not None


def test_curves_are_kept_and_used_at_any_sparsity(
    ok: Ok, text: tuple[Any, ...], pruning: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = ok(
        "curves", *text, "-m", "magnitude", "--share", 0.25, "--share", 0.5, "--no-refit", "--out", tmp_path / "c"
    )
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"curves.safetensors", "curves.csv", "curves.png"}
    assert "measure curves: " in result.stderr
    rows = table(tmp_path / "c" / "curves.csv")
    assert [int(row["width"]) for row in rows] == [D_FF // 4, D_FF // 2] * LAYERS
    assert all(float(row["rise"]) > 0 for row in rows)
    known = ffnscope.read_curves(tmp_path / "c" / "curves.safetensors")
    assert known.facts["refitted"] is False and known.facts["metric"] == "magnitude"
    given = ("--curves", tmp_path / "c" / "curves.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(curves, "measure_curves", None)
        patch.setattr("ffnscope.analyze.measured.measure_curves", None)
        for sparsity in (0.25, 0.5):
            changes = ("--sparsity", sparsity, "--curve-rounds", 1, "--overwrite")
            ok(*pruning, "-m", "magnitude", "--allocator", "measured", *given, *changes)
            plan = read_plan(tmp_path / "out" / "ffnscope_plan.json")
            assert plan.sparsity == sparsity
    result = ok(*pruning, *MEASURED, *given, "--overwrite")
    assert "measure curves: " not in result.stderr and "around the solution" in result.stderr


def test_curves_around_a_plan_with_a_refit(
    ok: Ok, text: tuple[Any, ...], pruning: tuple[Any, ...], tmp_path: Path
) -> None:
    ok(*pruning, "-m", "magnitude")
    plan = tmp_path / "out" / "ffnscope_plan.json"
    ok("curves", *text, "-m", "magnitude", "--around", plan, "--out", tmp_path / "c")
    found = ffnscope.read_curves(tmp_path / "c" / "curves.safetensors")
    assert (found.facts["around"], found.facts["refitted"]) == (0.5, True)
    assert {int(row["chosen"]) for row in table(tmp_path / "c" / "curves.csv")} == {D_FF // 2}


@pytest.mark.parametrize("refit", ["one-shot", "sequential"])
def test_cuts_are_refitted_where_the_method_refits(
    ok: Ok, pruning: tuple[Any, ...], checkpoint: Path, texts: Path, tmp_path: Path, refit: str
) -> None:
    ok(*pruning, *MEASURED, "--reconstruct", refit)
    kept = ffnscope.read_curves(tmp_path / "out" / "ffnscope_curves_2.safetensors")
    assert kept.facts["refitted"] is True
    plan = read_plan(tmp_path / "out" / "ffnscope_plan.json")
    loaded = model_of(checkpoint)
    source = ffnscope.TextSource(str(texts / "train.txt"))
    windows = ffnscope.load_windows(source, loaded.tokenizer, n=16, length=32, seed=42)
    method = ffnscope.Method("magnitude", "measured", "sequential" if refit == "sequential" else "one_shot")
    python = ffnscope.plan_and_reconstruct(loaded.model, windows, 0.5, method=method)  # on all 16 windows
    assert isinstance(python, ffnscope.Reconstruction) and python.plan.allocator == plan.allocator == "measured"
    assert python.plan.sparsity == plan.sparsity == 0.5


def test_an_interrupted_call_goes_on(
    ok: Ok, pruning: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok(*pruning, *MEASURED, "--out", tmp_path / "unbroken")
    arguments = [str(a) for a in (*pruning, *MEASURED)]
    with monkeypatch.context() as patch:
        patch.setattr(curves, "SAVED_SECONDS", -1.0)
        stop_at(patch, curves._Run, "measure", 2 * LAYERS + 2)  # 2 batches, then the second FFN of the second round
        assert CliRunner().invoke(app, arguments).exit_code == 130
    part = tmp_path / ".out.prune.part"
    assert {path.name for path in part.iterdir()} >= {"curves_1.json", "curves_2.json"}
    with monkeypatch.context() as patch:
        measured = stop_at(patch, curves._Run, "measure", 0)
        ok(*arguments)
    assert len(measured) == 2 * LAYERS - 1
    assert not part.exists()
    for name in ("ffnscope_curves_1.csv", "ffnscope_curves_2.csv"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "unbroken" / name).read_text()


def test_the_dry_run_computes_nothing(
    ok: Ok, text: tuple[Any, ...], pruning: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(calibrating, "_run_group", refuse)
    monkeypatch.setattr(files, "working_folder", refuse)
    told = ok(*pruning, *MEASURED, "--reconstruct", "sequential", "--dry-run").stdout
    cuts = LAYERS * (3 + 4)
    assert f"{cuts} cuts in 2 round(s) x 192 tokens, on average half of the layers, each refitted" in told
    assert "by measured: widths differ" in told
    told = ok("curves", *text, "--dry-run", "--out", tmp_path / "c").stdout
    assert "512 tokens forward" in told and f"{3 * LAYERS} cuts in 1 round(s) x 512 tokens" in told
    assert f"scar_loss_proxy x {LAYERS * D_FF} channels of {LAYERS} FFNs" in told
    assert list(tmp_path.iterdir()) == []


def test_the_dry_run_of_curves_tells_the_sums(
    ok: Ok, text: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the products of h h^T of 512 tokens, if one of them took a hundredth of a second."""
    monkeypatch.setattr(prune_estimate, "seconds_per_token", lambda *_: 0.0)
    monkeypatch.setattr(prune_estimate, "seconds_per_operation", lambda *_: 1e-2)
    told = ok("curves", *text, "-m", "magnitude", "--dry-run", "--out", tmp_path / "c").stdout
    (line,) = [one for one in told.splitlines() if "1 pass" in one]
    assert duration(0.5 * 512 * LAYERS * D_FF**2 * 1e-2) in line


@pytest.mark.parametrize("keep", [0.75, 40])
def test_floors(ok: Ok, fails: Fails, pruning: tuple[Any, ...], tmp_path: Path, keep: float) -> None:
    ok(*pruning, "-m", "magnitude", "--allocator", "global", "--sparsity", 0.1, "--min-keep", keep)
    plan = read_plan(tmp_path / "out" / "ffnscope_plan.json")
    assert min(plan.widths.values()) >= (keep if keep > 1 else keep * D_FF)
    assert plan.budget.min_keep == keep
    written = fails(2, *pruning, "-m", "magnitude", "--min-keep", keep, "--overwrite")
    assert "a sparsity of 0.5 leaves" in written


def test_curves_of_other_weights(
    ok: Ok, fails: Fails, text: tuple[Any, ...], pruning: tuple[Any, ...], tmp_path: Path
) -> None:
    ok("curves", *text, "-m", "magnitude", "--no-refit", "--dtype", "float64", "--out", tmp_path / "c")
    given = (*MEASURED, "--curves", tmp_path / "c" / "curves.safetensors")
    assert "measured on other weights than those of" in fails(2, *pruning, *given)
    other = (*MEASURED, "--curves", tmp_path / "c" / "curves.csv")
    assert "cannot be read" in fails(1, *pruning, *other)


@pytest.mark.parametrize(
    ("options", "text_"),
    [
        (["--share", "1.5"], "shares must be kept shares in (0, 1); got [1.5]"),
        (["--around", "p.json", "--share", "0.5"], "--share would do nothing with --around p.json"),
        (["--scores", "s", "--core-fraction", "0.1"], "--core-fraction would do nothing with --scores s"),
        (["-m", "wandas"], "Did you mean 'wanda'?"),
        (["--curve-samples", "0"], "num_samples of measured curves must be at least 1; got 0"),
    ],
)
def test_refused_before_the_model_is_loaded(
    fails: Fails, text: tuple[Any, ...], tmp_path: Path, options: list[str], text_: str
) -> None:
    assert text_ in fails(2, "curves", "/no/model", *text[1:], "--out", tmp_path / "c", *options)
    assert list(tmp_path.iterdir()) == []


def test_refusals_of_prune(fails: Fails, pruning: tuple[Any, ...]) -> None:
    given = ("--allocator", "measured", "--curves", "c", "--curve-rounds", 1, "--curve-samples", 4)
    assert "--curve-samples would do nothing with --curves c and --curve-rounds 1" in fails(2, *pruning, *given)
    one_width = ("--allocator", "measured", "--format", "gguf")
    assert "the allocator 'measured' gives them different ones" in fails(2, *pruning, *one_width)
