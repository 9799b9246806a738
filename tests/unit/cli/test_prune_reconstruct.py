"""The command prune with a reconstruction: whole methods, single parts, what is refused, resuming, and the dry run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import ffnscope
from checkpoints import small_tokenizer
from faults import stop_at
from ffnscope.apply import method, sequential
from ffnscope.calibrate import collect
from ffnscope.calibrate import passes as calibrating
from ffnscope.cli import app, files
from ffnscope.io import read_plan
from tiny import D_FF, LAYERS, tokens
from tiny_all import tiny_causal_lm

Ok = Callable[..., Result]
Fails = Callable[..., str]
SMALL = ("--num-samples", 16, "--max-length", 32, "--batch-size", 4, "--device", "cpu")


@pytest.fixture
def base(checkpoint: Path, texts: Path, tmp_path: Path) -> tuple[Any, ...]:
    """Arguments of a small pruning by the best method into ``out``, without the evaluation."""
    text = ("--text", texts / "train.txt", *SMALL)
    return ("prune", checkpoint, "--out", tmp_path / "out", "--sparsity", 0.5, "--no-evaluate", *text)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return ffnscope.load_model(ffnscope.ModelSource(str(folder), device="cpu")).model(input_ids=tokens()).logits


def part(tmp_path: Path) -> Path:
    return tmp_path / ".out.prune.part"


def test_best(ok: Ok, base: tuple[Any, ...], checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    result = ok(*base, "--method", "best")
    assert not part(tmp_path).exists()
    for told in ("calibrate: ", "score: ", "reconstruct (sequential): ", "blocks/s", "parameters ("):
        assert told in result.stderr, told
    assert "Layer error profile: sequential refit" in result.stdout
    assert result.stdout.count("mlp") == LAYERS
    words = " ".join(result.stdout.split())
    assert "held out to choose the damping, with columns fitted to the others; the saved" in words
    plan = read_plan(tmp_path / "out" / "ffnscope_plan.json")
    assert (plan.metric, plan.allocator, plan.sparsity) == ("scar_loss_proxy", "halfway", 0.5)
    told = plan.provenance["reconstruction"]
    assert (told["method"], told["target"], set(told["sites"])) == ("sequential", 0.35, {s.name for s in plan.kept})
    loaded = ffnscope.load_model(ffnscope.ModelSource(str(checkpoint), device="cpu"))
    text = ffnscope.TextSource(str(texts / "train.txt"))
    windows = ffnscope.load_windows(text, loaded.tokenizer, n=16, length=32, seed=42)
    python = ffnscope.plan_and_reconstruct(loaded.model, windows, 0.5)
    assert isinstance(python, ffnscope.Reconstruction)
    with torch.no_grad(), ffnscope.reconstructed(loaded.model, python):
        expected = loaded.model(input_ids=tokens()).logits
    assert torch.allclose(logits(tmp_path / "out"), expected, atol=1e-5)


def test_experts_cannot_be_distilled(fails: Fails, base: tuple[Any, ...], tmp_path: Path) -> None:
    tiny_causal_lm("mixtral").save_pretrained(tmp_path / "experts")
    small_tokenizer().save_pretrained(tmp_path / "experts")
    arguments = [tmp_path / "experts" if i == 1 else a for i, a in enumerate(base)]
    told = fails(2, *arguments, "--method", "best", "--distill", 2)
    assert "experts.0 cannot be distilled: it is an expert" in " ".join(told.split())
    assert not part(tmp_path).exists()


def test_local_gives_a_stock_checkpoint_and_the_widths_of_halfway_are_told(
    ok: Ok, base: tuple[Any, ...], tmp_path: Path
) -> None:
    ok(*base, "--method", "best", "--allocator", "local")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == D_FF // 2
    result = ok(*base, "--method", "best", "--overwrite")
    assert len(set(read_plan(tmp_path / "out" / "ffnscope_plan.json").widths.values())) > 1
    assert "the allocator local gives a checkpoint that plain transformers loads" in result.stderr


def test_the_perplexity_after_reload_is_that_before_saving(ok: Ok, checkpoint: Path, tmp_path: Path) -> None:
    options = ("--sparsity", 0.5, "--out", tmp_path / "out", "--text", "pydoc_topics", *SMALL)
    result = ok("prune", checkpoint, "--method", "best", *options, "--max-length", 64)
    assert "scar_loss_proxy + sequential refit" in result.stdout
    card = (tmp_path / "out" / "README.md").read_text()
    before = re.search(r"\| pruned \| perplexity \| ([\d.]+) ±", card)
    assert before
    loaded = ffnscope.load_model(ffnscope.ModelSource(str(tmp_path / "out"), device="cpu"))
    text = ffnscope.TextSource("pydoc_topics", split="test")
    windows = ffnscope.load_windows(text, loaded.tokenizer, n=16, length=64, seed=42)
    after = ffnscope.perplexity(loaded.model, windows)
    assert f"{after.value:.6g}" == before[1]
    assert "## Reconstruction" in card and "| kind | sequential refit |" in card and "| target | 0.35 |" in card
    assert "that were held out to choose the damping" in card
    assert re.search(r"of them afterwards \| [\d.e-]+ of its power without the refit, [\d.e-]+ with it \|", card)


def test_more_and_shorter_windows_unless_the_user_says_otherwise(ok: Ok, base: tuple[Any, ...], tmp_path: Path) -> None:
    arguments = [a for i, a in enumerate(base) if "--num-samples" not in (a, base[i - 1])]
    ok(*arguments, "--method", "best", "--device", "cpu", "--max-length", 16)
    calibration = read_plan(tmp_path / "out" / "ffnscope_plan.json").provenance["calibration"]
    assert (calibration["windows"], calibration["length"]) == (128, 16)


def test_one_shot_on_any_metric(ok: Ok, base: tuple[Any, ...], checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    result = ok(*base, "-m", "wanda", "--reconstruct", "one-shot", "--damping", 0.1)
    assert "Layer error profile: one-shot refit" in result.stdout
    plan = read_plan(tmp_path / "out" / "ffnscope_plan.json")
    assert (plan.metric, plan.allocator) == ("wanda", "local")
    assert {one["damping"] for one in plan.provenance["reconstruction"]["sites"].values()} == {0.1}
    loaded = ffnscope.load_model(ffnscope.ModelSource(str(checkpoint), device="cpu"))
    text = ffnscope.TextSource(str(texts / "train.txt"))
    stats = ffnscope.collect(
        loaded.model, ffnscope.load_windows(text, loaded.tokenizer, n=16, length=32, seed=42), ["h_outer", "act_sq"]
    )
    given = ffnscope.build_plan(ffnscope.score(loaded.model, stats, "wanda"), 0.5)
    with (
        torch.no_grad(),
        ffnscope.reconstructed(loaded.model, ffnscope.reconstruct(loaded.model, given, stats, damping=0.1)),
    ):
        expected = loaded.model(input_ids=tokens()).logits
    assert torch.allclose(logits(tmp_path / "out"), expected, atol=1e-5)


def test_one_shot_chooses_its_damping(
    ok: Ok, base: tuple[Any, ...], checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `reconstruct` does with the statistics of every 8th window; an interrupted call does no pass again."""
    options = (*base, "-m", "wanda", "--reconstruct", "one-shot")
    with monkeypatch.context() as patch:
        stop_at(patch, method, "reconstruct", 1)
        assert CliRunner().invoke(app, [str(a) for a in options]).exit_code == 130
    with monkeypatch.context() as patch:
        passes = stop_at(patch, calibrating, "_run_group", 0)
        result = ok(*options)
    assert not passes
    assert "calibrate held-out windows: " in result.stderr and "held out to choose the damping" in result.stdout
    told = read_plan(tmp_path / "out" / "ffnscope_plan.json").provenance["reconstruction"]
    assert told["damping"] == "chosen on held-out tokens"
    assert "| damping | chosen on held-out tokens |" in (tmp_path / "out" / "README.md").read_text()
    loaded = ffnscope.load_model(ffnscope.ModelSource(str(checkpoint), device="cpu"))
    source = ffnscope.TextSource(str(texts / "train.txt"))
    windows = ffnscope.load_windows(source, loaded.tokenizer, n=16, length=32, seed=42)
    asked = ffnscope.Method("wanda", "local", "one_shot")
    python = ffnscope.plan_and_reconstruct(loaded.model, windows, 0.5, method=asked)
    assert isinstance(python, ffnscope.Reconstruction)
    stats, held = (ffnscope.collect(loaded.model, part, ["h_outer"]) for part in (windows, windows[7::8]))
    by_hand = ffnscope.reconstruct(loaded.model, python.plan, stats, held_out=held)
    for site, one in by_hand.facts["sites"].items():
        assert told["sites"][site]["damping"] == one["damping"] == python.facts["sites"][site]["damping"]
        assert told["sites"][site]["held_out"] and one["tokens"] == windows.n_tokens
    assert all(torch.equal(down, by_hand.down[site]) for site, down in python.down.items())
    with torch.no_grad(), ffnscope.reconstructed(loaded.model, python):
        expected = loaded.model(input_ids=tokens()).logits
    assert torch.allclose(logits(tmp_path / "out"), expected, atol=1e-5)
    dry = " ".join(ok(*options, "--overwrite", "--dry-run").stdout.split())
    for text in (
        "held-out windows",
        "1 pass: 64 tokens forward, for the damping",
        "damping chosen on held-out windows",
    ):
        assert text in dry, text
    dry = " ".join(ok(*options, "--damping", 0.1, "--overwrite", "--dry-run").stdout.split())
    assert "held-out" not in dry and "damping 0.1" in dry


def test_distilled_is_told_to_be_trained(ok: Ok, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    """What Python gives, labelled in the table, in the card and in the plan; the perplexity is that after reload."""
    options = ("--sparsity", 0.5, "--out", tmp_path / "out", "--text", "pydoc_topics", *SMALL, "--max-length", 64)
    result = ok("prune", checkpoint, "--method", "best", "--distill", 2, *options)
    assert "scar_loss_proxy + sequential refit, distilled (trained)" in " ".join(result.stdout.split())
    assert "Layer error profile: sequential refit, distilled (trained)" in result.stdout
    assert "distill: gate, up and down of every FFN are trained for up to 2 epochs on 1,024 tokens" in result.stderr
    assert "blocks and epochs/s" in result.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| kind | sequential refit, distilled (trained) |" in card and "| distillation: epochs | 2 |" in card
    told = read_plan(tmp_path / "out" / "ffnscope_plan.json").provenance["reconstruction"]
    assert (told["trained"], told["tokens"], told["distillation"]["epochs"]) == (True, 1024, 2)
    before = re.search(r"\| pruned \| perplexity \| ([\d.]+) ±", card)
    loaded = ffnscope.load_model(ffnscope.ModelSource(str(tmp_path / "out"), device="cpu"))
    text = ffnscope.TextSource("pydoc_topics", split="test")
    windows = ffnscope.load_windows(text, loaded.tokenizer, n=16, length=64, seed=42)
    assert before and f"{ffnscope.perplexity(loaded.model, windows).value:.6g}" == before[1]


@pytest.mark.parametrize("reconstruct", ["one-shot", "sequential"])
def test_a_plan_that_is_there_already(ok: Ok, base: tuple[Any, ...], reconstruct: str, tmp_path: Path) -> None:
    ok(*base, "-m", "magnitude")
    plan = tmp_path / "out" / "ffnscope_plan.json"
    rest = [a for i, a in enumerate(base) if a != "--sparsity" and base[i - 1] != "--sparsity"]
    result = ok(*rest, "--plan", plan, "--reconstruct", reconstruct, "--out", tmp_path / "refit")
    assert f"{reconstruct} refit" in result.stdout
    assert ("calibrate: " in result.stderr) == (reconstruct == "one-shot")
    kept = read_plan(tmp_path / "refit" / "ffnscope_plan.json").kept
    assert all(torch.equal(index, kept[site]) for site, index in read_plan(plan).kept.items())
    assert not torch.equal(logits(tmp_path / "refit"), logits(tmp_path / "out"))


def test_an_interrupted_call_goes_on(
    ok: Ok, base: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok(*base, "--method", "best", "--out", tmp_path / "unbroken")
    arguments = [str(a) for a in (*base, "--method", "best")]
    with monkeypatch.context() as patch:
        stop_at(patch, sequential, "fit_columns", 2)
        assert CliRunner().invoke(app, arguments).exit_code == 130
    assert not (tmp_path / "out").exists()
    assert {path.name for path in part(tmp_path).iterdir()} >= {"calibrate.safetensors", "blocks"}
    with monkeypatch.context() as patch:
        passes, fits = stop_at(patch, calibrating, "_run_group", 0), stop_at(patch, sequential, "fit_columns", 0)
        ok(*arguments)
    assert (len(passes), len(fits)) == (0, LAYERS - 1)
    assert not part(tmp_path).exists()
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "unbroken"))


@pytest.mark.filterwarnings("ignore:.*fewer tokens than 4 d_ff")
def test_rounds(
    ok: Ok, fails: Fails, base: tuple[Any, ...], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*base, "--method", "best", "--rounds", 2)
    result = ok(*options, "--out", tmp_path / "unbroken")
    assert "round 2 of 2" in result.stderr and result.stderr.count("calibrate: ") >= 2
    plan = read_plan(tmp_path / "unbroken" / "ffnscope_plan.json")
    assert plan.sparsity == 0.5 and plan.provenance["rounds"] == [pytest.approx(1 - 0.5**0.5), 0.5]
    loaded = ffnscope.load_model(ffnscope.ModelSource(str(checkpoint), device="cpu"))
    text = ffnscope.read_record(tmp_path / "unbroken").text
    assert text is not None
    method = ffnscope.Method(rounds=2)
    python = ffnscope.plan_and_reconstruct(loaded.model, text.windows(loaded.tokenizer), 0.5, method=method)
    assert isinstance(python, ffnscope.Reconstruction)
    assert all(torch.equal(kept, plan.kept[site]) for site, kept in python.plan.kept.items())
    with monkeypatch.context() as patch:
        stop_at(patch, sequential, "fit_columns", LAYERS + 1)  # in the last refit
        assert CliRunner().invoke(app, [str(a) for a in options]).exit_code == 130
    assert len(list(part(tmp_path).glob("round_2_*.json"))) == 1
    with monkeypatch.context() as patch:
        passes = stop_at(patch, calibrating, "_run_group", 0)
        ok(*options)
    assert not passes and not part(tmp_path).exists()
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "unbroken"))
    again = ("prune", "--from", tmp_path / "out", "--sparsity", 0.3, "--out", tmp_path / "cut", "--no-evaluate")
    assert "Cut again in 1 round (--rounds 1)" in fails(2, *again)
    ok(*again, "--rounds", 1, "--device", "cpu")
    told = ok(*options, "--out", tmp_path / "dry", "--dry-run").stdout
    for line in ("round 2", "of what is left", "block by block: 2,048 tokens forward"):
        assert line in told, line


@pytest.mark.parametrize("reconstruct", ["none", "one-shot", "sequential"])
def test_the_weights_are_hashed_once(
    ok: Ok, base: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, reconstruct: str
) -> None:
    hashes = stop_at(monkeypatch, collect, "hash_tensors", 0)
    ok(*base, "-m", "wanda", "--reconstruct", reconstruct)
    assert len(hashes) == 1


def test_the_dry_run_computes_nothing(
    ok: Ok, base: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(calibrating, "_run_group", refuse)
    monkeypatch.setattr(files, "working_folder", refuse)
    told = ok(*base, "--method", "best", "--dry-run").stdout
    for text in (
        "1 pass: 512 tokens forward, 512 of them backward",
        "scar_loss_proxy x 96 channels of 2 FFNs",
        "widths differ",
        "block by block: 1,024 tokens forward",
        "calibration needs",
        "the reconstruction needs up to",
        "peak memory about",
    ):
        assert text in told, text
    assert "(trained)" not in told
    told = ok(*base, "--method", "best", "--distill", 3, "--dry-run").stdout
    assert "up to 3 epochs over 512 tokens in each FFN (trained)" in " ".join(told.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--method", "bset"], "Did you mean 'best'?"),
        (["--reconstruct", "sequentially"], "Unknown reconstruction 'sequentially'. Did you mean 'sequential'?"),
        (["--target", "0.5"], "--target would do nothing with --reconstruct none"),
        (["--distill", "2"], "--distill would do nothing with --reconstruct none"),
        (["--method", "best", "--distill", "0"], "distillation: epochs must be at least 1; got 0"),
        (["--reconstruct", "one-shot", "--target", "0.5"], "--target would do nothing with --reconstruct one-shot"),
        (["--damping", "0.1"], "--damping would do nothing with --reconstruct none"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--method", "best", "--damping", "0"], "damping must be positive"),
        (["--method", "best", "--target", "1.5"], "target must be 'own', 'dense' or a share between 0 and 1; got 1.5"),
        (["--method", "best", "--sparsity", "0"], "sparsity 0 leaves nothing for reconstruct 'sequential'"),
        (["--method", "best", "--format", "gguf"], "the allocator 'halfway' gives them different ones"),
        (
            ["--method", "best", "--allocator", "measured", "--curve-rounds", "0"],
            "rounds of measured curves must",
        ),
        (["--reconstruct", "bias", "--damping", "0.1"], "--damping would do nothing with --reconstruct bias"),
    ],
)
def test_refused_before_the_model_is_loaded(
    fails: Fails, base: tuple[Any, ...], tmp_path: Path, options: list[str], text: str
) -> None:
    arguments = ["/no/model" if i == 1 else a for i, a in enumerate(base)]
    assert text in fails(2, *arguments, *options)
    assert list(tmp_path.iterdir()) == []


def test_rounds_beside_scores(fails: Fails, checkpoint: Path, tmp_path: Path) -> None:
    options = ("--scores", "s", "--sparsity", 0.5, "--rounds", 2, "--out", tmp_path / "out", "--no-evaluate")
    assert "--rounds would do nothing with --scores s" in fails(2, "prune", checkpoint, *options)


def test_a_method_beside_a_plan(fails: Fails, checkpoint: Path, tmp_path: Path) -> None:
    options = ("--plan", "p.json", "--method", "best", "--out", tmp_path / "out", "--no-evaluate")
    assert "--method would do nothing with --plan p.json" in fails(2, "prune", checkpoint, *options)


def test_ffns_that_cannot_be_reconstructed_are_refused_before_the_pass(
    fails: Fails, base: tuple[Any, ...], tmp_path: Path
) -> None:
    model = tmp_path / "bitnet"
    tiny_causal_lm("bitnet").save_pretrained(model)
    small_tokenizer().save_pretrained(model)
    written = fails(2, "prune", model, *base[2:], "--method", "best")
    assert "cannot be reconstructed: a norm" in written and "calibrate" not in written
