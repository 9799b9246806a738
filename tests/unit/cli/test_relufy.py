"""The command relufy on a tiny checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from checkpoints import make_checkpoint
from faults import stop_at
from ffnscope.cli import app, relufy
from ffnscope.cli.relufy_estimate import training_advice
from ffnscope.run.bounds import Shapes
from ffnscope.run.switches import Machine
from ffnscope.sparse.relu.training import ReluOptions

MEBI = 2**20

QUICK = ("--max-length", 32, "--steps", 4, "--held-out-samples", 4, "--learning-rate", 1e-3)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "bert", "bert")


def test_makes_a_checkpoint(checkpoint, tmp_path, ok):
    result = ok(
        "relufy", checkpoint, "--out", tmp_path / "out", *QUICK, "--measure-every", 2, "--l1", 1.5, "--rise", 0.05
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"model.safetensors", "config.json", "progress.jsonl", "relufy.json", "thresholds.json"}
    rows = [json.loads(line) for line in (tmp_path / "out" / "progress.jsonl").read_text().splitlines()]
    stages = ["dense", "replaced", "training", "training", "trained", "shifted"]
    assert [row["stage"] for row in rows] == stages and rows[-1]["step"] == 4
    record = json.loads((tmp_path / "out" / "relufy.json").read_text())
    assert record["options"]["penalty"]["stages"][-1]["weight"] == pytest.approx(1.5)
    assert record["options"]["rise"] == 0.05 and record["text"]["windows"] == 4 * 4 + 4
    assert "exact zeros" in result.output and "shifted" in result.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_act == "relu"


def test_the_plot(checkpoint, tmp_path, ok):
    pytest.importorskip("matplotlib")
    ok("relufy", checkpoint, "--out", tmp_path / "out", *QUICK)
    assert (tmp_path / "out" / "relufy.png").stat().st_size > 10_000


def test_an_interrupt_in_the_plot_leaves_no_output_without_it(checkpoint, tmp_path, ok, monkeypatch):
    pytest.importorskip("matplotlib")
    asked = ("relufy", checkpoint, "--out", tmp_path / "out", *QUICK)
    with monkeypatch.context() as patch:
        stop_at(patch, relufy, "plot_relufy", 1)
        assert CliRunner().invoke(app, [str(a) for a in asked]).exit_code == 130
    assert not (tmp_path / "out").exists()
    ok(*asked)
    assert (tmp_path / "out" / "relufy.png").exists()


def test_dry_run_changes_nothing(checkpoint, tmp_path, ok):
    result = ok("relufy", checkpoint, "--out", tmp_path / "out", *QUICK, "--dry-run")
    assert "4 steps, 512 tokens" in result.output and "2 FFNs get relu" in result.output
    assert "one every 1 steps" in result.output
    assert (
        "peak memory" in result.output
        and "GiB of main memory: it fits" in result.output
        and list(tmp_path.iterdir()) == []
    )


def test_what_the_training_takes_by_hand():
    """A weight takes 16 bytes; a token 4 per value that is kept and 12 per logit."""
    shapes = Shapes(1000 * MEBI, 0, 0, 0, 64, 2**18, 2**16)
    options = ReluOptions(batch_size=4, accumulate=2)
    weights, window = 16_000, 512 * (4 * 2**18 + 12 * 2**16) // MEBI  # MiB
    machine = Machine(2 * (weights + 4 * window) * MEBI, None, 2**30)
    (line,) = training_advice(shapes, 512, options, machine)
    peak = (weights + 4 * window) / 1024 + 1
    assert (
        line
        == f"peak memory about {peak:.2f} GiB, in stage train; there are {2 * peak - 2:.2f} GiB of main memory: it fits"
    )
    first, second = training_advice(shapes, 512, options, replace(machine, ram=int((peak - 0.1) * 2**30)))
    assert first.endswith("it does NOT fit")
    small = (weights + window) / 1024 + 1
    assert second == f"  --batch-size 1 --accumulate 8 would take {small:.2f} GiB: fits"
    assert "does NOT fit either" in training_advice(shapes, 512, options, replace(machine, ram=2**30))[1]
    one = training_advice(shapes, 512, replace(options, batch_size=1), replace(machine, ram=2**30))
    assert len(one) == 1 and "no option but a shorter --max-length" in one[0]
    assert "could not be found out" in training_advice(shapes, 512, options, replace(machine, ram=None))[0]
    gpu = training_advice(replace(shapes, accelerator=True), 512, options, replace(machine, device=80 * 2**30))
    assert f"about {peak - 1:.2f} GiB and 1.00 GiB of main memory" in gpu[0] and "of the device's memory and" in gpu[0]
    assert gpu[0].endswith("GiB of main memory: it fits")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--no-shift", "--rise", 0.1), "--rise would do nothing with --no-shift"),
        (("--threshold", 0.1), "Set rise to None (--no-shift)"),
        (("--steps", 0), "steps must be at least 1"),
        (("--activation", "gelu"), "Unknown activation 'gelu'"),
        (("--split", "test"), "cannot be trained on and measured on"),
        (("--held-out-samples", 0), "--held-out-samples must be at least 1"),
        (("--l1", -1.0), "the last weight of the penalty must be 0 or more, and finite; got -1."),
    ],
)
def test_refusals(checkpoint, tmp_path, fails, more, message):
    options = [str(value) for value in more]
    assert message in fails(2, "relufy", checkpoint, "--out", tmp_path / "out", *options)


def test_an_own_text_needs_another_one(checkpoint, texts, tmp_path, fails, ok):
    train, test = texts / "train.txt", texts / "test.txt"
    call = ("relufy", checkpoint, "--out", tmp_path / "out", "--text", train)
    assert "Give --held-out-text" in fails(2, *call)
    assert "cannot be trained on" in fails(2, *call, "--held-out-text", train)
    ok(*call, "--held-out-text", test, *QUICK, "--no-shift")
    assert not (tmp_path / "out" / "thresholds.json").exists()
    assert "already exists" in fails(1, *call, "--held-out-text", test)


def test_a_model_whose_activation_cannot_be_replaced(bert, tmp_path, fails):
    written = fails(2, "relufy", bert, "--out", tmp_path / "out", *QUICK)
    assert "transform_act_fn" in written and "use another one" in written
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_not_there(checkpoint, tmp_path, fails):
    written = fails(2, "relufy", checkpoint, "--out", tmp_path / "out", "--text", tmp_path / "missing.txt")
    assert "missing.txt" in written and "held-out" not in written


def test_a_call_that_did_nothing_does_not_stand_in_the_way(checkpoint, tmp_path, fails, ok):
    call = ("relufy", checkpoint, "--out", tmp_path / "out", *QUICK, "--no-shift")
    assert "do not fit" in fails(2, *call, "--max-length", 500)
    ok(*call)
