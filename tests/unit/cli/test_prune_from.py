"""prune --from: another cut of an earlier result equals a fresh one, and calibrates nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

import ffnscope
from checkpoints import make_checkpoint
from faults import stop_at
from ffnscope.apply.record import read_record
from ffnscope.calibrate import passes as calibrating
from ffnscope.io import read_plan, read_scores
from ffnscope.run import config_from_dict, find_record
from runs import quiet_run, small_run

Ok = Callable[..., Result]
Fails = Callable[..., str]
SMALL = ("--num-samples", 16, "--max-length", 32, "--batch-size", 4)
pytestmark = pytest.mark.filterwarnings("ignore:.*fewer t")


@pytest.fixture
def base(checkpoint: Path, texts: Path) -> tuple[Any, ...]:
    """A small pruning without the evaluation."""
    return ("prune", checkpoint, "--no-evaluate", "--device", "cpu", "--text", texts / "train.txt", *SMALL)


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Steps of passes from now on: none are expected."""
    return stop_at(monkeypatch, calibrating, "_run_group", 0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return ffnscope.load_model(ffnscope.ModelSource(str(folder), device="cpu")).model.state_dict()


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    plans = [read_plan(folder / "ffnscope_plan.json") for folder in (one, other)]
    kept = all(torch.equal(index, plans[1].kept[site]) for site, index in plans[0].kept.items())
    told = plans[0].provenance == plans[1].provenance and plans[0].budget == plans[1].budget
    return kept and told and all(torch.equal(value, second[name]) for name, value in first.items())


def again(run: Path, out: Path, *options: Any) -> tuple[Any, ...]:
    return ("prune", "--from", run, "--out", out, "--no-evaluate", "--device", "cpu", *options)


@pytest.mark.parametrize(
    "method", [("--method", "best"), ("--method", "best", "--allocator", "local"), ("-m", "wanda")]
)
def test_it_is_a_fresh_pruning(
    ok: Ok, base: tuple[Any, ...], method: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out, fresh = (tmp_path / name for name in ("run", "out", "fresh"))
    ok(*base, *method, "--sparsity", 0.5, "--multiple-of", 4, "--out", run)
    ok(*base, *method, "--sparsity", 0.3, "--multiple-of", 4, "--out", fresh)
    steps = stop_at(monkeypatch, calibrating, "_run_group", 0)
    result = ok(*again(run, out, "--sparsity", 0.3))
    assert same(out, fresh) and not same(out, run)
    assert not steps and "calibrate" not in result.stderr
    assert sorted(path.name for path in (out / "ffnscope").iterdir()) == ["scores.safetensors"]
    assert not list(tmp_path.glob(".*"))
    ok(*again(out, tmp_path / "third", "--sparsity", 0.5))  # a cut can be cut again
    assert same(tmp_path / "third", run)


def test_another_allocator_width_and_reconstruction(
    ok: Ok, base: tuple[Any, ...], tmp_path: Path, calm: list[Any]
) -> None:
    calm.clear()
    run = tmp_path / "run"
    ok(*base, "--method", "best", "--sparsity", 0.5, "--out", run)
    made = len(calm)
    changes = ("--allocator", "local", "--multiple-of", 8, "--target", 0, "--damping", 0.1)
    ok(*again(run, tmp_path / "out", "--sparsity", 0.3, *changes))
    ok(*again(run, tmp_path / "bare", "--sparsity", 0.3, "--reconstruct", "none"))
    assert len(calm) == made
    plan, bare = (read_plan(tmp_path / name / "ffnscope_plan.json") for name in ("out", "bare"))
    assert set(plan.widths.values()) == {32} and plan.allocator == "local"
    assert plan.provenance["reconstruction"]["target"] == 0
    assert {one["damping"] for one in plan.provenance["reconstruction"]["sites"].values()} == {0.1}
    assert "reconstruction" not in bare.provenance and bare.allocator == "halfway"


def test_one_shot_reads_the_statistics_that_were_kept(
    ok: Ok, fails: Fails, base: tuple[Any, ...], tmp_path: Path, calm: list[Any]
) -> None:
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    one_shot = ("-m", "wanda", "--reconstruct", "one-shot")
    ok(*base, *one_shot, "--sparsity", 0.3, "--out", fresh)
    written = fails(2, *again(fresh, tmp_path / "out", "--sparsity", 0.5))
    assert "holds no statistics with h_outer" in written and "Prune again with --keep-statistics" in written
    ok(*base, "-m", "wanda", "--sparsity", 0.5, "--keep-statistics", "--out", run)
    steps = len(calm)
    ok(*again(run, tmp_path / "out", "--sparsity", 0.3, "--reconstruct", "one-shot", "--keep-statistics"))
    assert same(tmp_path / "out", fresh) and len(calm) == steps
    ok(*again(tmp_path / "out", tmp_path / "third", "--sparsity", 0.3))  # kept once more
    assert same(tmp_path / "third", fresh)
    told = read_plan(tmp_path / "third" / "ffnscope_plan.json").provenance["reconstruction"]
    assert told["damping"] == "chosen on held-out tokens"
    (run / "ffnscope" / "held_out.safetensors").unlink()  # as of a version that kept none
    old = ("--sparsity", 0.3, "--reconstruct", "one-shot")
    assert "damping 0.01" in " ".join(ok(*again(run, tmp_path / "old", *old, "--dry-run")).stdout.split())
    written = " ".join(ok(*again(run, tmp_path / "old", *old)).stderr.split())
    assert "holds no statistics of held-out windows, which choose the damping: it is 0.01 for every FFN" in written
    told = read_plan(tmp_path / "old" / "ffnscope_plan.json").provenance["reconstruction"]
    assert told["damping"] == "0.01, no tokens held out"
    assert {one["damping"] for one in told["sites"].values()} == {0.01}
    text = "--keep-statistics would do nothing: "
    assert text in fails(2, *again(fresh, tmp_path / "no", "--sparsity", 0.5, "--keep-statistics"))


def test_by_python(ok: Ok, base: tuple[Any, ...], checkpoint: Path, tmp_path: Path) -> None:
    ok(*base, "--method", "best", "--sparsity", 0.5, "--out", tmp_path / "run")
    loaded = ffnscope.load_model(ffnscope.ModelSource(str(checkpoint), device="cpu"))
    record = ffnscope.read_record(tmp_path / "run")
    assert record.text is not None
    windows = record.text.windows(loaded.tokenizer)
    fresh = ffnscope.plan_and_reconstruct(loaded.model, windows, 0.3)
    blocks: list[tuple[int, int]] = []
    found = ffnscope.recut(loaded.model, record, 0.3, windows=windows, on_block=lambda *now: blocks.append(now))
    assert isinstance(found, ffnscope.Reconstruction) and isinstance(fresh, ffnscope.Reconstruction)
    assert len(blocks) == len(found.down)
    for site, down in fresh.down.items():
        assert torch.equal(found.plan.kept[site], fresh.plan.kept[site])
        assert torch.equal(found.down[site], down)
    with pytest.raises(ffnscope.FFNScopeError, match="needs the calibration text: pass windows="):
        ffnscope.recut(loaded.model, record, 0.3)
    with pytest.raises(
        ffnscope.FFNScopeError, match=r"gives other windows \(hash .*\) than those that were calibrated"
    ):
        ffnscope.recut(loaded.model, record, 0.3, windows=windows[:4])
    with pytest.raises(ffnscope.FFNScopeError, match="holds scores of 'scar_loss_proxy', not of 'wanda'"):
        ffnscope.recut(loaded.model, record, 0.3, method=ffnscope.Method("wanda"))
    loaded.model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    with pytest.raises(ffnscope.FFNScopeError, match="was made from other weights than these"):
        ffnscope.recut(loaded.model, record, 0.3, windows=windows)


@pytest.mark.parametrize("reconstruct", ["none", "one_shot", "sequential"])
def test_from_a_run(
    ok: Ok, fails: Fails, checkpoint: Path, texts: Path, tmp_path: Path, calm: list[Any], reconstruct: str
) -> None:
    pruning = {"reconstruct": reconstruct, "algorithms": ["random", "wanda"], "ratios": [0.25, 0.5], "multiple_of": 4}
    changes = {"pruning": pruning, "supernode": {"enabled": True, "core_fraction": 0.1}}
    result = quiet_run(config_from_dict(small_run(checkpoint, texts, tmp_path / "run", **changes)))
    ratios = {"pruning": {**pruning, "ratios": [0.4]}}
    fresh = quiet_run(config_from_dict(small_run(checkpoint, texts, tmp_path / "fresh", **{**changes, **ratios})))
    written = fails(2, *again(result.folder, tmp_path / "out", "--sparsity", 0.4))
    assert "holds scores of random, wanda; choose one by --metric." in written
    steps = len(calm)
    ok(*again(result.folder, tmp_path / "out", "--sparsity", 0.4, "-m", "wanda"))
    assert len(calm) == steps
    plan, expected = read_plan(tmp_path / "out" / "ffnscope_plan.json"), fresh.plans["wanda-0.4"]
    assert plan.budget == expected.budget and plan.protected.keys() == expected.protected.keys()
    assert all(torch.equal(index, expected.kept[site]) for site, index in plan.kept.items())
    if reconstruct != "none":
        down = fresh.reconstructions["wanda-0.4"].down
        name = next(iter(down)).name
        found = weights(tmp_path / "out")[f"{name}.down_proj.weight"]
        assert torch.equal(found, next(iter(down.values())))
        record = find_record(result.folder, "wanda")
        assert record.text is not None and record.model["model_id"] == str(checkpoint)


def test_the_evaluation_is_that_of_the_earlier_result(ok: Ok, checkpoint: Path, tmp_path: Path) -> None:
    text = ("--text", "pydoc_topics", *SMALL, "--device", "cpu")
    first = ok("prune", checkpoint, "-m", "magnitude", "--sparsity", 0.5, "--out", tmp_path / "run", *text)
    rest = ("--out", tmp_path / "out", "--sparsity", 0.5, "--device", "cpu")
    second = ok("prune", "--from", tmp_path / "run", *rest)
    assert second.stdout == first.stdout and "Perplexity on pydoc_topics" in first.stdout


def test_the_dry_run(ok: Ok, base: tuple[Any, ...], tmp_path: Path, calm: list[Any]) -> None:
    ok(*base, "--method", "best", "--sparsity", 0.5, "--out", tmp_path / "run")
    made = len(calm)
    told = ok(*again(tmp_path / "run", tmp_path / "out", "--sparsity", 0.3, "--dry-run")).stdout
    for text in ("none: scar_loss_proxy of ", "0.3 of the channels by halfway", "block by block: 1,024 tokens forward"):
        assert text in told, text
    assert "tokens backward" not in told and "1 pass" not in told
    assert len(calm) == made and not (tmp_path / "out").exists()


def test_a_text_at_another_place(ok: Ok, fails: Fails, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    first = shutil.copy(texts / "train.txt", tmp_path / "first.txt")
    given = ("--method", "best", "--sparsity", 0.5, "--no-evaluate", "--device", "cpu", *SMALL)
    ok("prune", checkpoint, *given, "--text", first, "--out", tmp_path / "run")
    Path(first).rename(tmp_path / "second.txt")
    options = again(tmp_path / "run", tmp_path / "out", "--sparsity", 0.3)
    written = fails(2, *options)
    assert "first.txt does not exist" in written and "at another place now, give that (--text)" in written
    written = fails(2, *options, "--text", texts / "test.txt")
    assert "gives other windows" in written and "the text or the tokenizer has changed" in written
    assert not (tmp_path / "out").exists()
    ok(*options, "--text", tmp_path / "second.txt")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--method", "best"], "--method would do nothing with --from"),
        (["--seed", "3", "--max-length", "8"], "--max-length, --seed would do nothing with --from"),
        (["--split", "test"], "--split would do nothing with --from"),
        (["--param", "random.seed=3"], "--param would do nothing with --from"),
        (["-m", "wandas"], "'wandas' is not among them"),
        (["-m", "magnitude"], "holds scores of wanda; 'magnitude' is not among them"),
        (["--scores", "s"], "--from and --scores both say which channels go"),
        (["--target", "0.5"], "--target would do nothing with --reconstruct none"),
        (["--text", "sotu"], "--text would do nothing with --from"),
        (["--protect-fraction", "0.9"], "cannot remove 0.3 of the channels while --protect-fraction keeps 0.9"),
        (["--multiple-of", "64"], "no width of at least 1 that is a multiple of 64 fits"),
    ],
)
def test_refused_options(
    ok: Ok, fails: Fails, base: tuple[Any, ...], tmp_path: Path, options: list[str], text: str
) -> None:
    run = tmp_path / "run"
    ok(*base, "-m", "wanda", "--sparsity", 0.5, "--out", run)
    written = fails(2, *again(run, tmp_path / "out", "--sparsity", 0.3, *options))
    assert text in written.replace(f"--from {run} and", "--from and"), written
    assert not (tmp_path / "out").exists()


def test_refused_folders(ok: Ok, fails: Fails, base: tuple[Any, ...], checkpoint: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert "does not exist; name the output of an earlier" in fails(
        1, *again(tmp_path / "none", out, "--sparsity", 0.3)
    )
    (tmp_path / "file").write_text("")
    assert "is a file, not a folder" in fails(1, *again(tmp_path / "file", out, "--sparsity", 0.3))
    written = fails(1, *again(checkpoint, out, "--sparsity", 0.3))
    assert "holds no ffnscope/scores.safetensors: it is not what `ffnscope prune` wrote" in written
    ok(*base, "-m", "wanda", "--sparsity", 0.5, "--out", run)
    assert "sparsity must be in [0, 1)" in fails(2, *again(run, out, "--sparsity", 30))
    assert "give either --sparsity" in fails(2, *again(run, out))
    other = make_checkpoint(tmp_path / "other", seed=1)
    written = fails(2, "prune", other, *again(run, out, "--sparsity", 0.3)[1:])
    assert (
        "was made from other weights than these" in written
        and f"Give the model that was pruned ({checkpoint})" in written
    )
    rest = ("--plan", run / "ffnscope_plan.json", "--out", tmp_path / "planned", "--no-evaluate")
    ok("prune", checkpoint, *rest)
    assert "was pruned by --plan" in fails(1, *again(tmp_path / "planned", out, "--sparsity", 0.3))
    (run / "ffnscope" / "scores.safetensors").write_bytes(b"nothing")
    assert "cannot be read" in fails(1, *again(run, out, "--sparsity", 0.3))
    assert "give MODEL, or --from RUN" in fails(2, "prune", "--sparsity", 0.5, "--out", out)


def test_protection_and_what_is_kept(ok: Ok, base: tuple[Any, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    ok(*base, "-m", "wanda", "--sparsity", 0.25, "--protect-fraction", 0.25, "--out", run)
    record = read_record(run)
    assert {index.numel() for index in record.protected.values()} == {12}
    assert list(read_scores(run / "ffnscope" / "scores.safetensors")[0]) == ["wanda"]
    ok(*again(run, tmp_path / "out", "--sparsity", 0.5))
    first, second = (read_plan(folder / "ffnscope_plan.json") for folder in (run, tmp_path / "out"))
    assert all(torch.equal(index, second.protected[site]) for site, index in first.protected.items())
    ok(*again(run, tmp_path / "less", "--sparsity", 0.5, "--protect-fraction", 0.125))
    assert {i.numel() for i in read_plan(tmp_path / "less" / "ffnscope_plan.json").protected.values()} == {6}
