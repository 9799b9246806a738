"""place: the plan of a card and of a ReLU model, its labels, its file, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import ffnscope
from checkpoints import make_checkpoint
from faults import stop_at
from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.cli import app
from ffnscope.run import placement_steps
from ffnscope.sparse.placement.frequency import channel_frequencies
from ffnscope.sparse.placement.parts import split_
from ffnscope.sparse.placement.plan import read_placement
from ffnscope.sparse.placement.selections import card_selections, relu_selections, selection_bytes
from ffnscope.sparse.relu.thresholds import THRESHOLDS, NonZero, write_thresholds
from ffnscope.sparse.selector import AllChannels
from ffnscope.sparse.tracing import trace
from tiny import D_FF, HIDDEN, LAYERS, tokens

Ok = Callable[..., Result]
Fails = Callable[..., str]
CHANNEL = 3 * HIDDEN * 4
MACHINE = ("--fast-bandwidth", 100, "--slow-bandwidth", 10, "--sync", 0)
SMALL = ("--num-samples", 24, "--max-length", 24)
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device the speed is measured")


@pytest.fixture(scope="module")
def relu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("relu") / "model", "llama_relu")


@pytest.fixture
def base(relu: Path, tmp_path: Path) -> tuple[Any, ...]:
    budget = f"{20 * CHANNEL}"
    return ("place", relu, "--out", tmp_path / "plan.json", "--budget", budget, *MACHINE, *SMALL)


@no_cuda
def test_a_relu_model(ok: Ok, base: tuple[Any, ...], relu: Path, tmp_path: Path) -> None:
    result = ok(*base)
    placement = read_placement(tmp_path / "plan.json")
    assert 0 < placement.bytes <= placement.budget == 20 * CHANNEL
    assert set(placement.channel_bytes.values()) == {CHANNEL}
    for word in (
        "(predicted)",
        "(simulated, ",
        "Not measured: there is no CUDA device",
        "MiB fast",
        "weights as they are",
    ):
        assert word in result.stdout
    assert placement.facts["simulated"]["kind"] == "simulated" and placement.facts["selection"] == "exact zeros"
    assert placement.facts["bytes_of"] == "weights as loaded (float32)"
    assert placement.predicted.tokens_per_second > placement.all_slow.tokens_per_second
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]
    model = ffnscope.load_model(ffnscope.ModelSource(str(relu), device="cpu")).model
    dense = model(tokens(1, 4)).logits
    with split_(model, placement, relu_selections(model), fast="cpu"):
        torch.testing.assert_close(model(tokens(1, 4)).logits, dense)


@no_cuda
def test_the_machine_has_what_is_not_ffn_and_what_selects(
    ok: Ok, base: tuple[Any, ...], relu: Path, tmp_path: Path
) -> None:
    ok(*base)
    placement = read_placement(tmp_path / "plan.json")
    model = ffnscope.load_model(ffnscope.ModelSource(str(relu), device="cpu")).model
    rest = sum(p.nbytes for name, p in model.named_parameters() if ".mlp." not in name and "embed" not in name)
    gates = LAYERS * D_FF * HIDDEN * 4
    assert placement.facts["selection_bytes"] == gates
    assert placement.machine.other_seconds == pytest.approx(rest / 100e9 + gates / 10e9)


def test_json(ok: Ok, base: tuple[Any, ...]) -> None:
    found = json.loads(ok(*base, "--json").stdout)
    assert [row["d_ff"] for row in found["sites"]] == [D_FF] * LAYERS
    assert found["bytes"] == sum(row["bytes_fast"] for row in found["sites"]) <= found["budget"]
    assert [one["kind"] for one in found["speeds"]][:2] == ["predicted", "simulated"]
    assert all(0 <= row["hit"] <= 1 for row in found["sites"])


def test_a_card(ok: Ok, checkpoint: Path, tmp_path: Path) -> None:
    rule = ("--predictor-param", "group=8", "--policy", "top_k", "--device", "cpu")
    ok("sparsify", checkpoint, "--out", tmp_path / "card", "--target", "density=0.3", *SMALL, *rule)
    card = tmp_path / "card" / "card.json"
    out = tmp_path / "plan.json"
    told = ok("place", checkpoint, "--card", card, "--out", out, "--budget", "8KiB", *MACHINE, *SMALL).stdout
    assert "(simulated, " in told and read_placement(out).budget == 8192
    model = ffnscope.load_model(ffnscope.ModelSource(str(checkpoint), device="cpu")).model
    chosen = card_selections(model, ffnscope.read_card(card))
    assert selection_bytes(chosen) == sum(one.predictor.bytes_read for one in chosen.values())  # type: ignore[attr-defined]


def test_dense_ffns_of_a_card_are_all_channels(ok: Ok, checkpoint: Path, tmp_path: Path) -> None:
    ok("sparsify", checkpoint, "--out", tmp_path, "--target", "density=0.98", *SMALL, "--device", "cpu")
    model = ffnscope.load_model(ffnscope.ModelSource(str(checkpoint), device="cpu")).model
    chosen = card_selections(model, ffnscope.read_card(tmp_path / "card.json"))
    assert len(chosen) == LAYERS and all(isinstance(one, AllChannels) for one in chosen.values())
    assert selection_bytes(chosen) == 0 and bool(next(iter(chosen.values()))(torch.zeros(2, HIDDEN)).all())


def test_thresholds_beside_a_model_count(relu: Path, ok: Ok, base: tuple[Any, ...], tmp_path: Path) -> None:
    model = ffnscope.load_model(ffnscope.ModelSource(str(relu), device="cpu")).model
    sites = ffnscope.find_sites(model)
    write_thresholds(relu / THRESHOLDS, dict.fromkeys(sites, 0.05), {})
    try:
        ok(*base)
    finally:
        (relu / THRESHOLDS).unlink()
    windows = contiguous_windows(tokens(6, 12), "random")
    traces = trace(model, windows, tmp_path / "traces")
    plain, raised = (
        channel_frequencies(traces, relu_selections(model, dict.fromkeys(sites, at)))[sites[0]].sum()
        for at in (0, 0.05)
    )
    assert raised < plain
    with pytest.raises(ffnscope.errors.UsageError, match="thresholds are of other FFNs"):
        relu_selections(model, {sites[0]: 0.1})
    assert isinstance(relu_selections(model)[sites[0]], NonZero)


def test_it_goes_on(base: tuple[Any, ...], ok: Ok, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = tmp_path / ".plan.json.place.part"
    with monkeypatch.context() as patch:
        stop_at(patch, placement_steps, "plan_placement", 1)
        assert CliRunner().invoke(app, [str(a) for a in base]).exit_code == 130
    assert [path.name.startswith("traces_") for path in part.iterdir() if path.is_dir()] == [True]
    ok(*base)
    assert not part.exists()


def test_dry_run(ok: Ok, base: tuple[Any, ...], tmp_path: Path) -> None:
    told = ok(*base, "--dry-run").stdout
    assert "576 tokens" in told and f"for {LAYERS * D_FF} channels of {LAYERS} FFNs" in told and "it fits" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "much"), "--budget 'much' is no size: expected bytes, or text such as 2GiB"),
        (("--budget", "-1GB"), "is no size"),
        (("--fast-bandwidth", 0), "fast must be a bandwidth in bytes per second; got 0"),
        (("--sync", -1), "sync_seconds must be 0 or more"),
        (("--new-tokens", 0), "--new-tokens must be at least 1"),
        (("--device", "cuda"), "leave out --device"),
        (("--num-samples", 2), "needs at least 3 documents; the traces have 2"),
        (("--text", "missing.txt"), "missing.txt"),
    ],
)
def test_refused(fails: Fails, base: tuple[Any, ...], tmp_path: Path, options: tuple[Any, ...], message: str) -> None:
    assert message in fails(2, *base, *options)
    assert not list(tmp_path.iterdir())


@no_cuda
def test_an_unknown_fast_device(fails: Fails, base: tuple[Any, ...]) -> None:
    without = [one for i, one in enumerate(base) if "--fast-bandwidth" not in base[max(i - 1, 0) : i + 1]]
    assert "there is no CUDA device here whose bandwidth could be measured" in fails(2, *without)


def test_a_model_without_zeros_needs_a_card(fails: Fails, base: tuple[Any, ...], checkpoint: Path) -> None:
    told = fails(2, "place", checkpoint, *base[2:])
    assert "has the activation silu, which makes no channel exactly zero" in told


def test_a_card_of_another_model(ok: Ok, fails: Fails, base: tuple[Any, ...], checkpoint: Path, tmp_path: Path) -> None:
    ok("sparsify", checkpoint, "--out", tmp_path / "card", "--target", "density=0.3", *SMALL, "--device", "cpu")
    told = fails(1, *base, "--card", tmp_path / "card" / "card.json")
    assert "has the activation silu" in told and "has relu there" in told


def test_outputs_are_kept(fails: Fails, ok: Ok, base: tuple[Any, ...], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("mine")
    assert "already exists" in fails(1, *base)
    assert (tmp_path / "plan.json").read_text() == "mine"
    ok(*base, "--overwrite")
    assert read_placement(tmp_path / "plan.json").bytes > 0
    assert "must end in .json" in fails(2, *base, "--out", tmp_path / "plan.yaml")
