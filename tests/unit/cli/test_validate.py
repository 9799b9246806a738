"""``rank --validate``: measured on a tiny checkpoint from end to end, continued, refused, estimated."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from checkpoints import make_checkpoint
from faults import stop_at
from ffnscope.analyze.question import Question
from ffnscope.analyze.sample import ChannelSample
from ffnscope.analyze.validate import ValidationOptions
from ffnscope.calibrate import passes as calibrating
from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.cli import validate as command
from ffnscope.cli.validate_estimate import validation_lines, validation_work
from ffnscope.ffn.sites import find_sites
from ffnscope.io import read_json
from ffnscope.registry import METRICS
from ffnscope.run import switches
from ffnscope.run.bounds import Load
from tiny import tiny

Ok = Callable[..., Result]
Fails = Callable[..., str]
SMALL = ("--num-samples", 4, "--max-length", 32, "--batch-size", 2, "--device", "cpu")
SAMPLE = ("--channels", 12, "--sites", 2, "--held-out-samples", 6)


@pytest.fixture
def base(checkpoint: Path, texts: Path) -> tuple[Any, ...]:
    text = ("--text", texts / "train.txt", "--held-out", texts / "test.txt")
    return ("rank", checkpoint, "--validate", *text, *SMALL, *SAMPLE)


def test_named_metrics_end_to_end(ok: Ok, fails: Fails, base: tuple[Any, ...], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "trust"
    options = (*base, "-m", "wanda", "-m", "magnitude", "--sparsity", 0.25, "--sparsity", 0.5)
    printed = ok(*options, "--out", out, "--plots")
    assert "Spearman with measured changes" in printed.stdout
    assert "Perplexity after pruning" in printed.stdout
    assert "random (floor)" in printed.stdout
    assert "ablate" in printed.stderr and "evaluate" in printed.stderr
    value = read_json(out / "validation.json")
    assert [row["metric"] for row in value["rows"]][-1] == "random"
    assert {row["metric"] for row in value["rows"]} == {"wanda", "magnitude", "random"}
    assert value["rows"][0].keys() >= {"spearman_loss", "spearman_loss_low", "perplexity_global_0.5"}
    assert sum(len(site["channels"]) for site in value["ablations"]) == 12
    assert value["dense_perplexity"] > 1 and value["skipped"] == {} and value["whole_model_ran_for"] == []
    with (out / "validation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["perplexity_local_0.25"]) for row in rows] == [r["perplexity_local_0.25"] for r in value["rows"]]
    assert "| random (floor) |" in (out / "validation.md").read_text()
    assert {path.name for path in (out / "plots").iterdir()} == {
        "rank_quality.png",
        "measured.png",
        "scores.png",
        "percolation.png",
        "paths.png",
    }
    assert not (out / command.UNFINISHED).exists()
    assert "already exists" in fails(1, *options, "--out", out)
    ok(*options, "--out", out, "--overwrite")


def test_every_metric_or_the_reason_why_not(ok: Ok, base: tuple[Any, ...], tmp_path: Path) -> None:
    printed = ok(*base, "--sparsity", 0, "--out", tmp_path / "all")
    value = read_json(tmp_path / "all" / "validation.json")
    rows = {row["metric"] for row in value["rows"]}
    assert rows | set(value["skipped"]) == set(METRICS.names())
    assert "delta_alignment" in value["skipped"]
    assert "No row for delta_alignment: it needs the model before fine-tuning" in printed.stdout
    assert value["dense_perplexity"] is None
    assert "Perplexity after pruning" not in printed.stdout


def test_a_reference_makes_its_metric_a_row(ok: Ok, base: tuple[Any, ...], tmp_path: Path) -> None:
    before = make_checkpoint(tmp_path / "before", seed=1)
    ok(*base, "-m", "delta_alignment", "--reference", before, "--sparsity", 0, "--out", tmp_path / "one")
    rows = read_json(tmp_path / "one" / "validation.json")["rows"]
    assert [row["metric"] for row in rows] == ["delta_alignment", "random"]


def test_an_interrupted_call_goes_on(
    ok: Ok, base: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "trust", command.compare_with_dense
    options = (*base, "-m", "magnitude", "--out", out)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "compare_with_dense", interrupted)
    with pytest.raises((KeyboardInterrupt, AssertionError)):
        ok(*options)
    assert (out / command.UNFINISHED / "ablate.json").exists()
    monkeypatch.setattr(command, "compare_with_dense", real)
    monkeypatch.setattr("ffnscope.analyze.ablation._losses_without", None)  # everything is in the file
    ok(*options)
    assert (out / "validation.json").exists() and not (out / command.UNFINISHED).exists()


@pytest.mark.parametrize(("function", "expected"), [("observe_batch", 1), ("ablate_channels", 0)])
def test_a_calibration_is_kept_for_the_next_call(
    ok: Ok,
    fails: Fails,
    base: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    expected: int,
) -> None:
    """Cut off at the last of five batches, that one is left to run; while channels are ablated, none."""
    batches: list[int] = []
    real = calibrating.observe_batch

    def counted(*args: Any) -> None:
        batches.append(1)
        real(*args)

    options = (*base, "-m", "wanda", "--sparsity", 0, "--num-samples", 40, "--batch-size", 8, "--out")
    ok(*options, tmp_path / "whole")
    out, module = tmp_path / "out", calibrating if function == "observe_batch" else command
    with monkeypatch.context() as patch:
        stop_at(patch, module, function, 5 if module is calibrating else 1)
        fails(130, *options, out)
    with monkeypatch.context() as patch:
        patch.setattr(calibrating, "observe_batch", counted)
        ok(*options, out)
    assert len(batches) == expected
    assert (out / "validation.json").read_text() == (tmp_path / "whole" / "validation.json").read_text()


def test_damaged_sums_of_a_calibration_are_told_and_made_again(
    ok: Ok, fails: Fails, base: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*base, "-m", "wanda", "--sparsity", 0, "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_at(patch, command, "ablate_channels", 1)
        fails(130, *options)
    sums = tmp_path / "out" / command.UNFINISHED / "calibrate.safetensors"
    sums.write_bytes(sums.read_bytes()[:-7])
    said = ok(*options).stderr
    assert str(sums) in said and "It is deleted, and this stage starts anew." in said


def test_dry_run_computes_nothing(ok: Ok, base: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "calibrate_all", None)
    monkeypatch.setattr(command, "ablate_channels", None)
    printed = ok(*base, "--dry-run").stdout
    assert "12 channels of 2 FFNs x 192 tokens" in printed
    assert "calibrate" in printed and "prune" in printed
    assert "no row for delta_alignment" in printed


def test_dry_run_tells_memory_and_needs_none(ok: Ok, base: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ffnscope.cli.options.load_model", None)  # which would load all weights
    monkeypatch.setattr(switches, "main_memory", lambda: 2**19)
    monkeypatch.setattr(command, "library_bytes", lambda: 0)
    printed = ok(*base, "-m", "scar_loss_proxy", "-m", "obs", "--dry-run").stdout
    assert "memory by stage: calibrate " in printed and "score " in printed and "evaluate " in printed
    assert "there are 0.00 GiB of main memory: it does NOT fit" in printed
    assert "--batch-size 1 would take" in printed and printed.count(": fits") > 1
    streamed = ok(*base, "-m", "wanda", "--stream", "disk", "--sparsity", 0, "--dry-run").stdout
    assert "GiB on disk meanwhile" in streamed and "prune" not in streamed


def test_stages_of_the_dry_run_by_hand() -> None:
    """6 windows of 8 tokens to calibrate on, 5 of 4 to measure on, 2 at a time; each of the blocks is a share b."""
    model = tiny("llama")
    asked = Question(model, find_sites(model), {"wanda": {}, "scar_loss_proxy": {}})
    texts = tuple(contiguous_windows(torch.zeros(shape, dtype=torch.long), "zeros") for shape in ((6, 8), (5, 4)))
    options = ValidationOptions(ChannelSample(5, 2), (0.5,), ("local", "global"), 2)
    lines = {line.stage: line for line in validation_lines(asked, (texts[0], texts[1]), options, 1.0, 1.0)}
    whole = sum(p.numel() for p in model.parameters())
    b = sum(p.numel() for p in model.model.layers[0].parameters()) / whole
    assert (lines["calibrate"].seconds, lines["calibrate"].reads) == (2 * 48, 4)
    assert lines["ablate"].seconds == pytest.approx(20 * (2 + 3 + 2 * (1 - b)))  # 3 channels of the first FFN
    tried, each = 3 + (3 - b), 5 * (1 + 2) + 5 * (1 + 1 - b)  # pairs of channels, for one window each
    assert lines["ablate"].reads == math.ceil(tried + each)
    n_models = 1 + 3 * 2  # random is the third metric
    assert (lines["prune"].seconds, lines["prune"].reads) == (n_models * 20, 2 + n_models)
    assert lines["score"].seconds is None
    work = validation_work(asked, (texts[0], texts[1]), options)
    assert (work.forward, work.backward, work.held_out) == (Load(48, 8, 2), Load(48, 8, 2), Load(20, 4, 2))
    assert work.only == ("calibrate", "score", "evaluate") and work.sums > 0


def test_a_metric_that_was_named_must_not_fail(fails: Fails, base: tuple[Any, ...]) -> None:
    assert "Did you mean 'wanda'?" in fails(2, *base, "-m", "wandas")
    assert "needs the model before fine-tuning: give --reference" in fails(2, *base, "-m", "delta_alignment")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--channels", "1"], "a sample needs at least 2 channels"),
        (["--sparsity", "30"], "sparsities must be distinct and in (0, 1), fractions of channels to remove; got 30."),
        (["--allocator", "locl"], "Did you mean 'local'?"),
        (["--plots"], "--plots would do nothing without a folder to draw into; add --out FOLDER."),
        (["--top", "3"], "--top would do nothing with --validate"),
        (["--scores", "s"], "--scores would do nothing with --validate"),
        (["--held-out-samples", "0"], "--held-out-samples must be at least 1; got 0."),
        (["--held-out", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_refused_before_a_model_is_loaded(
    fails: Fails, base: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, options: list[str], text: str
) -> None:
    monkeypatch.setattr("ffnscope.cli.options.load_model", None)
    assert text in fails(2, *base, *options)


def test_refused_texts(fails: Fails, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    start = ("rank", checkpoint, "--validate")
    assert "has no known held-out split to measure on. Name another text with --held-out." in fails(
        2, *start, "--text", texts / "train.txt"
    )
    assert "--split test is the held-out split of sotu" in fails(2, *start, "--split", "test")
    assert "--validate needs a model" in fails(2, "rank", "--validate")
    (tmp_path / "file").write_text("")
    assert "is a file; --out must be a folder" in fails(1, *start, "--out", tmp_path / "file")


def test_options_of_a_validation_are_refused_without_it(fails: Fails, checkpoint: Path) -> None:
    written = fails(2, "rank", checkpoint, "--channels", 16, "--plots")
    assert "--channels, --plots would do nothing with a ranking alone, without --validate" in written
    assert "rank lists the channels by one metric; got wanda, magnitude" in fails(
        2, "rank", checkpoint, "-m", "wanda", "-m", "magnitude"
    )
