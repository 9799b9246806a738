"""The command score over several seeds and texts, and with metrics that need more than one pass over the text."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

import ffnscope
from checkpoints import make_checkpoint
from ffnscope.analyze import levels
from ffnscope.calibrate import passes as calibrating
from ffnscope.io import read_plan, read_scores, read_stats
from runs import strict_json
from tiny import D_FF, LAYERS

Ok = Callable[..., Result]
Fails = Callable[..., str]
SMALL = ("--num-samples", 4, "--max-length", 32, "--batch-size", 2, "--device", "cpu")


@pytest.fixture
def base(checkpoint: Path, texts: Path, tmp_path: Path) -> tuple[Any, ...]:
    return ("score", checkpoint, "--text", texts / "train.txt", "--out", tmp_path / "out", *SMALL)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return strict_json(folder / "stability.json")["rows"]


# --- repeats ---


def test_seeds_and_texts_are_compared_pair_by_pair(ok: Ok, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    options = (
        "--text",
        "pydoc_topics",
        "--repeats",
        2,
        "--repeat-text",
        texts / "train.txt",
        "-m",
        "wanda",
        "-m",
        "sparsegpt",
    )
    result = ok("score", checkpoint, "--out", tmp_path, "--overwrite", *options, *SMALL)
    labels = ["pydoc_topics seed 42", "pydoc_topics seed 43", f"{texts / 'train.txt'} seed 42"]
    pairs = [(0, 1), (0, 2), (1, 2)]
    rows = rows_of(tmp_path)
    assert [(row["metric"], row["first"], row["second"]) for row in rows] == [
        (metric, labels[a], labels[b]) for metric in ("wanda", "sparsegpt") for a, b in pairs
    ]
    for row in rows:
        assert -1 <= row["spearman"] < 1
        assert 0 <= row["top1_jaccard"] <= 1
        by_document = min(row["documents_first"], row["documents_second"]) > 1
        assert row["interval_method"] == ("jackknife" if by_document else "one document")
        assert (row["spearman_low"] is not None) == by_document
        if by_document:
            assert row["spearman_low"] <= row["spearman"] <= row["spearman_high"]
            assert row["top1_jaccard_low"] <= row["top1_jaccard"] <= row["top1_jaccard_high"]
    with (tmp_path / "stability.csv").open(newline="") as file:
        flat = list(csv.DictReader(file))
    assert [float(row["spearman"]) for row in flat] == [row["spearman"] for row in rows]
    assert flat[-1]["spearman_low"] == ""  # a .txt file is one document
    assert "Agreement of rankings" in result.stdout
    assert f"{rows[0]['spearman']:.3f}" in result.stdout


def test_the_scores_are_those_without_repeats(ok: Ok, base: tuple[Any, ...], tmp_path: Path) -> None:
    ok(*base, "-m", "wanda")
    repeated = [tmp_path / "again" if v == tmp_path / "out" else v for v in base]
    ok(*repeated, "-m", "wanda", "--repeats", 2)
    one, two = (tmp_path / name / "scores.safetensors" for name in ("out", "again"))
    assert one.read_bytes() == two.read_bytes()
    assert not (tmp_path / "out" / "stability.json").exists()
    assert len(rows_of(tmp_path / "again")) == 1


def test_every_kind_of_metric_can_be_repeated(ok: Ok, base: tuple[Any, ...], tmp_path: Path, checkpoint: Path) -> None:
    names = ["random", "scar_loss_proxy", "supernode_protection_score", "activation_outlier_index", "delta_alignment"]
    metrics = [v for name in names for v in ("-m", name)]
    reference = make_checkpoint(tmp_path / "before", seed=1)
    ok(*base, *metrics, "--repeats", 2, "--reference", reference, "--core-fraction", 0.1)
    rows = rows_of(tmp_path / "out")
    assert [row["metric"] for row in rows] == names
    assert all(math.isfinite(row["spearman"]) for row in rows)
    assert [row["interval_method"] for row in rows] == ["no text", *["one document"] * 4]  # train.txt is one document


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--repeats", "0"], "--repeats must be at least 1, the number of seeds; got 0."),
        (["--repeat-text", "sotu", "--repeat-text", "sotu"], "--repeat-text sotu is there already; name each"),
        (["-m", "delta_alignment"], "metric 'delta_alignment' needs the model before fine-tuning: give --reference"),
        (["--reference", "x"], "--reference x would do nothing"),
        (["--core-fraction", "0.1"], "--core-fraction would do nothing"),
        (["-m", "supernode_connectivity_score", "--core-fraction", "0"], "core fraction must be in (0, 1]"),
        (["-m", "composite", "--param", "composite.parts={}"], "composite needs parts"),
    ],
)
def test_refused_before_a_model_is_loaded(
    fails: Fails,
    base: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    text: str,
) -> None:
    monkeypatch.setattr("ffnscope.cli.options.load_model", None)
    assert text in fails(2, *base, "-m", "wanda", *options)
    assert not (tmp_path / "out").exists()


def test_a_missing_text_is_refused_before_the_first_calibration(
    fails: Fails, base: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrating, "observe_batch", None)
    assert "none.txt" in fails(2, *base, "-m", "wanda", "--repeat-text", tmp_path / "none.txt")
    assert not (tmp_path / "out").exists()


def test_metrics_that_draw_follow_the_repeat_unless_fixed(
    ok: Ok, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    """The floor: random agrees with itself as much as any two random rankings do."""
    options = ("--text", "pydoc_topics", "--repeats", 2, "--repeat-text", texts / "train.txt", "--seed", 7, *SMALL)
    ok("score", checkpoint, "-m", "random", "--out", tmp_path / "free", *options)
    rows = rows_of(tmp_path / "free")
    assert len(rows) == 3
    assert all(abs(row["spearman"]) < 0.5 for row in rows)  # also of the other text, which has the same text seed
    found, _ = read_scores(tmp_path / "free" / "scores.safetensors")
    assert found["random"].facts["params"] == {"seed": 7}
    model = ffnscope.load_model(str(checkpoint)).model
    tables = [ffnscope.score(model, found["random"].sites, "random", seed=7 + i) for i in range(3)]
    assert all(torch.equal(v, tables[0].values[site]) for site, v in found["random"].values.items())
    expected = [ffnscope.agreement(tables[a], tables[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert [row["spearman"] for row in rows] == [one.spearman for one in expected]
    ok("score", checkpoint, "-m", "random", "--param", "random.seed=3", "--out", tmp_path / "fixed", *options)
    assert [row["spearman"] for row in rows_of(tmp_path / "fixed")] == [1.0] * 3


ALL_KINDS = ("-m", "wanda", "-m", "sparsegpt", "-m", "supernode_protection_score", "-m", "random")
REPEATED = ("--text", "pydoc_topics", "--num-samples", 6, "--max-length", 16, "--batch-size", 1, "--repeats", 2)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches that models ran; with a number in it, an interrupt comes instead of that batch."""
    real, seen = calibrating.observe_batch, [0, 0]

    def counted(*args: Any) -> None:
        seen[0] += 1
        if seen[0] == seen[1]:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(calibrating, "observe_batch", counted)
    return seen


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("stop", [3, 9, 14, 21, 27, 33, 47])
def test_score_goes_on_in_every_pass(
    ok: Ok, fails: Fails, checkpoint: Path, tmp_path: Path, batches: list[int], stop: int
) -> None:
    """Eight passes of 6 batches: two, and three for each of two calibrations. A finished pass is not run again."""
    options = ("score", checkpoint, *ALL_KINDS, *REPEATED, "--out")
    ok(*options, tmp_path / "whole")
    assert batches[0] == 8 * 6
    batches[:] = [0, stop]
    said = fails(130, *options, tmp_path / "out")
    assert "interrupted. Called again, `run`, `score`, `prune`, " in said
    finished = (stop - 1) // 6
    assert (tmp_path / "out").exists() == (finished > 0)
    ok(*options, tmp_path / "out")
    assert batches[0] - stop <= 6 * (8 - finished)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_an_unfinished_output_may_be_finished_by_another_question(
    ok: Ok, fails: Fails, checkpoint: Path, tmp_path: Path, batches: list[int]
) -> None:
    out = tmp_path / "out"
    batches[1] = 33
    fails(130, "score", checkpoint, *ALL_KINDS, *REPEATED, "--out", out)
    for folder in (out, tmp_path / "fresh"):
        ok("score", checkpoint, "-m", "flap", *REPEATED, "--out", folder)
    assert files_of(out) == files_of(tmp_path / "fresh")
    assert "already exists" in fails(1, "score", checkpoint, "-m", "flap", *REPEATED, "--out", out)
    ok("score", checkpoint, "-m", "flap", *REPEATED[:-2], "--out", out, "--overwrite")
    assert "stability.json" not in files_of(out)  # it belonged to the replaced scores


@pytest.mark.usefixtures("two_passes")
def test_a_damaged_state_of_a_repeat_is_told_and_made_again(
    ok: Ok, fails: Fails, checkpoint: Path, tmp_path: Path, batches: list[int]
) -> None:
    options = ("score", checkpoint, *ALL_KINDS, *REPEATED, "--out")
    ok(*options, tmp_path / "whole")
    batches[:] = [0, 47]
    fails(130, *options, tmp_path / "out")
    damaged = sorted((tmp_path / "out" / "score.part").rglob("*.safetensors"))
    assert {path.parent.name for path in damaged} == {"score.part", "repeat_0", "repeat_1"}
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-7])
    said = ok(*options, tmp_path / "out").stderr
    assert all(str(path) in said for path in damaged)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.usefixtures("two_passes")
def test_dry_run_tells_every_pass_and_computes_nothing(
    ok: Ok, checkpoint: Path, tmp_path: Path, batches: list[int]
) -> None:
    options = ("score", checkpoint, *REPEATED, "--out", tmp_path / "out", "--dry-run")
    text = ok(*options, *ALL_KINDS).stdout
    assert "8 passes over a text in all" in text  # two, and three for each of two calibrations
    for label in ("pydoc_topics seed 42", "pydoc_topics seed 43"):
        for stage in ("calibrate", "calibrate core", "leave groups out"):
            assert f"{label}: {stage} " in text
    assert text.count("96 tokens forward, 96 of them backward") == 8
    assert "without each of" in text and "nothing was computed" in text
    assert "3 passes over a text in all" in ok(*options, "-m", "wanda").stdout
    assert "5 passes over a text in all" in ok(*options, "-m", "sparsegpt").stdout
    assert "0 passes over a text in all" in ok(*options, "-m", "random").stdout
    alone = ok(*options[:-5], *options[-3:], "-m", "sparsegpt").stdout
    assert "1 passes over a text in all" in alone and "without each of" not in alone
    assert batches[0] == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop", [3, 9])
def test_score_goes_on_where_one_pass_finds_the_core_too(
    ok: Ok, fails: Fails, checkpoint: Path, tmp_path: Path, batches: list[int], stop: int
) -> None:
    options = ("score", checkpoint, *ALL_KINDS, *REPEATED, "--out")
    assert "7 passes over a text in all" in ok(*options, tmp_path / "whole", "--dry-run").stdout
    ok(*options, tmp_path / "whole")
    assert batches[0] == 7 * 6
    batches[:] = [0, stop]
    fails(130, *options, tmp_path / "out")
    ok(*options, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


# --- metrics that need more ---


def test_core_metrics_through_score(ok: Ok, base: tuple[Any, ...], checkpoint: Path, tmp_path: Path) -> None:
    ok(*base, "-m", "supernode_protection_score", "-m", "supernode_connectivity_score", "--core-fraction", 0.25)
    stats, _ = read_stats(tmp_path / "out" / "statistics.safetensors")
    size = round(0.25 * D_FF)
    for part in stats.values():
        assert part.values["taylor_core"].shape == (size, D_FF)
    found, _ = read_scores(tmp_path / "out" / "scores.safetensors")
    model = ffnscope.load_model(str(checkpoint)).model
    core = ffnscope.top_core(ffnscope.score(model, stats, "scar_loss_proxy"), 0.25)
    for name, one in found.items():
        again = ffnscope.score(model, stats, name, core=core)
        assert all(one.values[site].tolist() == again.values[site].tolist() for site in stats)


@pytest.mark.usefixtures("two_passes")
def test_core_metrics_through_prune(
    ok: Ok, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, passes = levels.calibrate, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(kwargs.get("core"))
        return real(*args, **kwargs)

    monkeypatch.setattr(levels, "calibrate", counted)
    options = ("--text", texts / "train.txt", "--no-evaluate", "--out", tmp_path / "out", *SMALL)
    metric = ("-m", "supernode_protection_score", "--core-fraction", 0.25)
    ok("prune", checkpoint, "--sparsity", 0.5, *metric, *options)
    plan = read_plan(tmp_path / "out" / "ffnscope_plan.json")
    assert len(passes) == 2
    assert not plan.protected  # --core-fraction defines the core; it protects nothing
    assert plan.metric == "supernode_protection_score"
    for site, core in passes[1].items():
        assert core.numel() == 12
        assert set(core.tolist()) <= set(plan.kept[site].tolist())


def test_a_reference_through_score_and_prune(
    ok: Ok, fails: Fails, base: tuple[Any, ...], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    reference = make_checkpoint(tmp_path / "before", seed=1)
    ok(*base, "-m", "delta_alignment", "--reference", reference)
    found, facts = read_scores(tmp_path / "out" / "scores.safetensors")
    assert all(bool((v > 0).all()) for v in found["delta_alignment"].values.values())
    assert facts["reference"] == ffnscope.weights_hash(ffnscope.load_model(str(reference)).model)
    options = ("--text", texts / "train.txt", "--no-evaluate", "--out", tmp_path / "pruned", "--sparsity", 0.25, *SMALL)
    prune = ("prune", checkpoint, "-m", "delta_alignment", *options)
    assert "needs the model before fine-tuning: give --reference MODEL." in fails(2, *prune)
    ok(*prune, "--reference", reference)
    plan = read_plan(tmp_path / "pruned" / "ffnscope_plan.json")
    assert len(plan.kept) == LAYERS and plan.sparsity == 0.25


def test_a_composite_of_parts(ok: Ok, base: tuple[Any, ...], checkpoint: Path, tmp_path: Path) -> None:
    ok(*base, "-m", "composite", "--param", "composite.parts={wanda: 1.0, magnitude: 0.5}")
    found, _ = read_scores(tmp_path / "out" / "scores.safetensors")
    parts = {"wanda": 1.0, "magnitude": 0.5}
    assert found["composite"].facts["params"] == {"parts": parts, "normalise": "rank"}
    stats, _ = read_stats(tmp_path / "out" / "statistics.safetensors")
    model = ffnscope.load_model(str(checkpoint)).model
    expected = ffnscope.score(model, stats, "composite", parts=parts)
    assert all(v.tolist() == expected.values[s].tolist() for s, v in found["composite"].values.items())
