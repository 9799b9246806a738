"""The command prune: every way to a checkpoint that plain transformers loads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import ffnscope
from checkpoints import make_checkpoint
from ffnscope.io import read_json, read_plan, read_scores, write_plan, write_scores
from ffnscope.run import config_from_dict
from runs import quiet_run, small_run
from tiny import D_FF, HIDDEN, LAYERS, tokens

Ok = Callable[..., Result]
Fails = Callable[..., str]
SMALL = ("--num-samples", 4, "--max-length", 32, "--batch-size", 2, "--device", "cpu")


@pytest.fixture
def base(checkpoint: Path, texts: Path, tmp_path: Path) -> tuple[Any, ...]:
    """Arguments of a small pruning into ``out``, without the evaluation."""
    return ("prune", checkpoint, "--out", tmp_path / "out", "--text", texts / "train.txt", "--no-evaluate", *SMALL)


@pytest.fixture
def decided(checkpoint: Path, tmp_path: Path) -> tuple[Any, ...]:
    """Arguments of a pruning into ``out`` that reads no text: what it needs comes from a file."""
    return ("prune", checkpoint, "--out", tmp_path / "out", "--no-evaluate", "--device", "cpu")


@pytest.fixture(scope="module")
def scored(checkpoint: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of the checkpoint."""
    loaded = ffnscope.load_model(str(checkpoint))
    text = ffnscope.TextSource(str(texts / "train.txt"))
    windows = ffnscope.load_windows(text, loaded.tokenizer, n=4, length=32)
    names = ["scar_loss_proxy", "wanda"]
    stats = ffnscope.calibrate(loaded.model, windows, names)
    path = tmp_path_factory.mktemp("scored") / "scores.safetensors"
    facts = {"model": ffnscope.weights_hash(loaded.model)}
    ffnscope.write_scores(path, [ffnscope.score(loaded.model, stats, name) for name in names], facts)
    return path


def reload(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def said(result: Result) -> tuple[int, int]:
    """Parameters before and after, as printed."""
    before, after = re.findall(r"([\d,]+) -> ([\d,]+) parameters", result.stderr)[-1]
    return int(before.replace(",", "")), int(after.replace(",", ""))


def test_prune_to_a_sparsity(ok: Ok, base: tuple[Any, ...], checkpoint: Path, tmp_path: Path) -> None:
    result = ok(*base, "--sparsity", 0.25)
    pruned, dense = reload(tmp_path / "out"), reload(checkpoint)
    assert said(result) == (parameters(dense), parameters(pruned))
    assert parameters(dense) - parameters(pruned) == LAYERS * 12 * 3 * HIDDEN
    assert pruned.config.intermediate_size == 36
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size > 250
    plan = read_plan(tmp_path / "out" / "ffnscope_plan.json")
    assert (plan.metric, plan.allocator, plan.sparsity) == ("scar_loss_proxy", "local", 0.25)
    with torch.no_grad(), ffnscope.masked(dense, plan):
        expected = dense(input_ids=tokens()).logits
        assert torch.allclose(pruned(input_ids=tokens()).logits, expected, atol=1e-4)


def test_prune_by_a_plan(ok: Ok, base: tuple[Any, ...], decided: tuple[Any, ...], tmp_path: Path) -> None:
    ok(*base, "--sparsity", 0.5, "-m", "wanda", "--multiple-of", 16)
    plan = tmp_path / "out" / "ffnscope_plan.json"
    assert set(read_plan(plan).widths.values()) == {32}  # 24 rounded to a multiple of 16, halves up
    ok(*decided, "--plan", plan, "--out", tmp_path / "again")
    first, second = (reload(tmp_path / name).state_dict() for name in ("out", "again"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_prune_by_scores(ok: Ok, decided: tuple[Any, ...], scored: Path, tmp_path: Path) -> None:
    result = ok(*decided, "--sparsity", 0.5, "--scores", scored, "-m", "wanda")
    assert "calibrate" not in result.stderr
    plan = read_plan(tmp_path / "out" / "ffnscope_plan.json")
    assert plan.metric == "wanda"
    assert not plan.protected
    assert "note" not in result.stderr


def test_protection_keeps_the_best_of_every_ffn(
    ok: Ok, decided: tuple[Any, ...], scored: Path, checkpoint: Path, tmp_path: Path
) -> None:
    # the first FFN has the lowest scores by far, so a global ranking alone would take nearly all of it
    facts = {"model": ffnscope.weights_hash(ffnscope.load_model(str(checkpoint)).model)}
    one = read_scores(scored)[0]["wanda"]
    first = one.sites[0]
    values = {site: value / 1e6 if site == first else value for site, value in one.values.items()}
    write_scores(tmp_path / "s", [ffnscope.Scores("wanda", values)], facts)
    options = (*decided, "--sparsity", 0.5, "--scores", tmp_path / "s", "-m", "wanda", "--allocator", "global")
    kept = {}
    for name, more in (("bare", ()), ("protected", ("--protect-fraction", 0.25))):
        result = ok(*options, *more, "--pad-to-widest", "--out", tmp_path / name)
        assert "note" not in result.stderr
        kept[name] = read_plan(tmp_path / name / "ffnscope_plan.json")
    assert kept["bare"].widths[first] == 1
    assert kept["protected"].widths[first] == 12
    best = ffnscope.top_core(one, 0.25)
    assert all(torch.equal(index, best[site]) for site, index in kept["protected"].protected.items())
    assert kept["protected"].kept[first].tolist() == best[first].tolist()


def test_an_option_that_changes_nothing_is_told(ok: Ok, decided: tuple[Any, ...], scored: Path, tmp_path: Path) -> None:
    options = (*decided, "--sparsity", 0.5, "--scores", scored)
    result = ok(*options, "--protect-fraction", 0.1, "--pad-to-widest")
    assert "note: --protect-fraction 0.1 changes nothing here; the plan keeps these channels anyway." in result.stderr
    assert "note: padding changes nothing here; every FFN keeps the same number" in result.stderr
    plan = read_plan(tmp_path / "out" / "ffnscope_plan.json")
    assert {index.numel() for index in plan.protected.values()} == {5}


def test_prune_with_a_parameter(ok: Ok, base: tuple[Any, ...], tmp_path: Path) -> None:
    for seed in (1, 2):
        out = tmp_path / str(seed)
        ok(*base, "--sparsity", 0.5, "-m", "random", "--param", f"random.seed={seed}", "--out", out)
    one, two = (read_plan(tmp_path / str(seed) / "ffnscope_plan.json") for seed in (1, 2))
    assert any(one.kept[site].tolist() != two.kept[site].tolist() for site in one.kept)


def test_different_widths(ok: Ok, decided: tuple[Any, ...], scored: Path, checkpoint: Path, tmp_path: Path) -> None:
    result = ok(*decided, "--sparsity", 0.5, "--allocator", "global", "--scores", scored)
    assert "widths differ: load it with ffnscope, or in transformers with trust_remote_code=True" in result.stderr
    plan, dense = read_plan(tmp_path / "out" / "ffnscope_plan.json"), reload(checkpoint)
    pruned = ffnscope.load_model(str(tmp_path / "out")).model
    assert [site.d_ff for site in ffnscope.find_sites(pruned)] == list(plan.widths.values())
    assert said(result)[1] == parameters(pruned)
    with torch.no_grad(), ffnscope.masked(dense, plan):
        expected = dense(input_ids=tokens()).logits
        assert torch.allclose(pruned(input_ids=tokens()).logits, expected, atol=1e-4)
    assert "2 FFNs, 48 channels" in ok("inspect", tmp_path / "out").stdout


def test_padded_to_the_widest(ok: Ok, decided: tuple[Any, ...], scored: Path, checkpoint: Path, tmp_path: Path) -> None:
    result = ok(*decided, "--sparsity", 0.5, "--allocator", "global", "--scores", scored, "--pad-to-widest")
    plan = read_plan(tmp_path / "out" / "ffnscope_plan.json")
    pruned, dense = reload(tmp_path / "out"), reload(checkpoint)
    assert pruned.config.intermediate_size == max(plan.widths.values()) < D_FF
    assert said(result)[1] == parameters(pruned)
    with torch.no_grad(), ffnscope.masked(dense, plan):
        expected = dense(input_ids=tokens()).logits
        assert torch.allclose(pruned(input_ids=tokens()).logits, expected, atol=1e-4)


def test_decilm(ok: Ok, fails: Fails, decided: tuple[Any, ...], scored: Path, texts: Path, tmp_path: Path) -> None:
    ok(*decided, "--sparsity", 0.5, "--allocator", "global", "--scores", scored, "--format", "decilm")
    config = read_json(tmp_path / "out" / "config.json")
    widths = read_plan(tmp_path / "out" / "ffnscope_plan.json").widths
    assert [block["ffn"]["intermediate_size"] for block in config["block_configs"]] == list(widths.values())
    gpt2 = make_checkpoint(tmp_path / "gpt2", "gpt2")
    options = ("--sparsity", 0.5, "--format", "decilm", "--out", tmp_path / "no", "--text", texts / "train.txt")
    written = fails(2, "prune", gpt2, *options, "--no-evaluate")
    assert "this model is a GPT2LMHeadModel" in written and "calibrate" not in written


def test_gguf(ok: Ok, fails: Fails, decided: tuple[Any, ...], scored: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.gguf"
    options = (*decided, "--scores", scored, "--format", "gguf", "--out", out, "--sparsity", 0.5)
    assert "the format 'gguf' has one width for all FFNs" in fails(2, *options, "--allocator", "global")
    assert not out.exists()
    assert "--max-shard-size would do nothing" in fails(2, *options, "--max-shard-size", "1GB")
    ok(*options)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=out.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    ok(*decided, "--scores", scored, "--sparsity", 0.5)
    with torch.no_grad():
        expected = reload(tmp_path / "out")(input_ids=tokens()).logits
        assert torch.equal(again(input_ids=tokens()).logits, expected)
    assert "already exists" in fails(1, *options)
    ok(*options, "--allocator", "global", "--pad-to-widest", "--overwrite")


def test_the_achieved_sparsity_and_shards(ok: Ok, base: tuple[Any, ...], tmp_path: Path) -> None:
    result = ok(*base, "--sparsity", 0.4, "-m", "magnitude", "--multiple-of", 16, "--max-shard-size", "20KB")
    assert "removed 0.3333 of the FFN channels (asked 0.4; widths are multiples of 16)" in result.stderr
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    result = ok(*base, "--sparsity", 0.25, "-m", "magnitude", "--overwrite")
    assert "removed 0.2500 of the FFN channels (asked 0.25)\n" in result.stderr


def test_the_card(ok: Ok, checkpoint: Path, tmp_path: Path) -> None:
    options = ("--sparsity", 0.25, "-m", "wanda", "--out", tmp_path / "out", "--text", "pydoc_topics")
    ok("prune", checkpoint, *options, *SMALL)
    card = (tmp_path / "out" / "README.md").read_text()
    plan = read_plan(tmp_path / "out" / "ffnscope_plan.json")
    assert f"| calibration hash | {plan.provenance['calibration']['hash']} |" in card
    assert "| made from | llama |" in card and "| metric | wanda |" in card
    assert re.search(
        r"\| dense \| perplexity \| [\d.]+ ± [\d.]+ \| \d+ \| pydoc_topics.*\n\| pruned \| perplexity", card
    )


def test_before_and_after_on_held_out_text(ok: Ok, checkpoint: Path, tmp_path: Path) -> None:
    options = ("--sparsity", 0.25, "-m", "weight_magnitude", "--out", tmp_path / "out", "--text", "pydoc_topics")
    result = ok("prune", checkpoint, *options, *SMALL)
    assert "dense" in result.stdout
    assert "weight_magnitude" in result.stdout
    assert "Perplexity on pydoc_topics" in result.stdout
    assert re.search(r"split\s+test: 4 of", result.stdout)


def test_prune_gpt2(ok: Ok, texts: Path, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "gpt2", "gpt2")
    options = ("--sparsity", 0.25, "--out", tmp_path / "out", "--text", texts / "train.txt", "--no-evaluate", *SMALL)
    ok("prune", model, *options)
    assert reload(tmp_path / "out").config.n_inner == 36


def test_overwrite_replaces_a_checkpoint(ok: Ok, fails: Fails, base: tuple[Any, ...], tmp_path: Path) -> None:
    ok(*base, "--sparsity", 0.25, "-m", "magnitude")
    assert "already exists" in fails(1, *base, "--sparsity", 0.5, "-m", "magnitude")
    assert reload(tmp_path / "out").config.intermediate_size == 36
    ok(*base, "--sparsity", 0.5, "-m", "magnitude", "--overwrite")
    assert reload(tmp_path / "out").config.intermediate_size == 24


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "give either --sparsity (make a plan) or --plan FILE (apply one)."),
        (["--sparsity", "0.5", "--plan", "p.json"], "give either --sparsity"),
        (["--sparsity", "30"], "sparsity must be in [0, 1), the fraction of channels to remove; got 30."),
        (["--sparsity", "0.5", "-m", "wandas"], "Did you mean 'wanda'?"),
        (["--sparsity", "0.5", "--allocator", "globl"], "Did you mean 'global'?"),
        (["--sparsity", "0.5", "--curve-rounds", "1"], "--curve-rounds would do nothing with --allocator local"),
        (["--sparsity", "0.5", "--min-keep", "1.5"], "min_keep must be a share of the channels in [0, 1], or a whole"),
        (["--plan", "p.json", "--min-keep", "0.1"], "--min-keep would do nothing with --plan p.json"),
        (["--sparsity", "0.5", "--format", "ggfu"], "Unknown format 'ggfu'. Did you mean 'gguf'?"),
        (["--sparsity", "0.5", "--max-shard-size", "5 apples"], "max_shard_size must be a number with KB, MB"),
        (["--sparsity", "0.5", "--multiple-of", "0"], "multiple_of and min_width must be at least 1"),
        (["--sparsity", "0.5", "--multiple-of", "64"], "no width of at least 1 that is a multiple of 64 fits"),
        (
            ["--sparsity", "0.5", "-m", "supernode_protection_score", "--core-fraction", "2"],
            "core fraction must be in (0, 1]",
        ),
        (["--plan", "p.json", "-m", "wanda"], "--metric would do nothing with --plan p.json"),
        (["--plan", "p.json", "--allocator", "global", "--core-fraction", "0.1"], "--allocator, --core-fraction would"),
        (["--plan", "p.json", "--protect-fraction", "0.1"], "--protect-fraction would do nothing with --plan p.json"),
        (
            ["--sparsity", "0.5", "--scores", "s", "--core-fraction", "0.1"],
            "--core-fraction would do nothing with --sc",
        ),
        (["--sparsity", "0.5", "--core-fraction", "0.1"], "--core-fraction would do nothing: no metric here reads the"),
        (["--sparsity", "0.5", "--protect-fraction", "2"], "--protect-fraction must be in (0, 1], the share of each"),
        (["--sparsity", "0.8", "--protect-fraction", "0.3"], "cannot remove 0.8 of the channels while --protect-fract"),
    ],
)
def test_refused_options(
    fails: Fails, base: tuple[Any, ...], decided: tuple[Any, ...], tmp_path: Path, options: list[str], text: str
) -> None:
    from_file = {"--plan", "--scores"} & set(options)
    assert text in fails(2, *(decided if from_file else base), *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", [("--plan", "p.json"), ("--sparsity", "0.5", "--scores", "s")])
@pytest.mark.parametrize("option", ["--text", "--split", "--num-samples", "--max-length", "--batch-size", "--seed"])
def test_options_of_a_text_that_nobody_reads(
    fails: Fails, decided: tuple[Any, ...], source: tuple[str, ...], option: str
) -> None:
    words = (
        f"{option} would do nothing with {' '.join(source[-2:])} and --no-evaluate, which read no text. Leave it out"
    )
    assert words in fails(2, *decided, *source, option, "4")


def test_the_split_of_an_evaluation_is_fixed(fails: Fails, decided: tuple[Any, ...]) -> None:
    evaluated = [value for value in decided if value != "--no-evaluate"]
    options = ("--sparsity", 0.5, "--scores", "s", "--num-samples", 4, "--split", "train")
    assert "--split would do nothing with --scores s, which already decides that" in fails(2, *evaluated, *options)


def test_refused_texts(fails: Fails, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    options = ("prune", checkpoint, "--sparsity", 0.5, "--out", tmp_path / "out", "--text")
    assert "or pass --no-evaluate" in fails(2, *options, texts / "train.txt")
    assert "--split test is the held-out split of sotu" in fails(2, *options, "sotu", "--split", "test")


def test_refused_scores(fails: Fails, decided: tuple[Any, ...], scored: Path, tmp_path: Path) -> None:
    options = ("--sparsity", 0.5, "--scores", scored)
    assert "'magnitude' is not among them" in fails(2, *decided, *options, "-m", "magnitude")
    other = make_checkpoint(tmp_path / "other", seed=1)
    assert "was made from other weights" in fails(2, "prune", other, *decided[2:], *options)
    assert "does not exist" in fails(1, *decided, "--sparsity", 0.5, "--scores", tmp_path / "none")


def test_a_plan_of_another_model(fails: Fails, decided: tuple[Any, ...], tmp_path: Path) -> None:
    other = ffnscope.load_model(str(make_checkpoint(tmp_path / "other", intermediate_size=64))).model
    scores = ffnscope.score(other, ffnscope.find_sites(other), "magnitude")
    write_plan(tmp_path / "plan.json", ffnscope.build_plan(scores, 0.5))
    assert "this model has 48" in fails(2, *decided, "--plan", tmp_path / "plan.json")
    assert not (tmp_path / "out").exists()


def test_score_then_prune_then_eval(ok: Ok, checkpoint: Path, tmp_path: Path) -> None:
    """The commands of the README, one after the other."""
    text = ("--text", "pydoc_topics", *SMALL)
    ok("score", checkpoint, "-m", "wanda", "-m", "scar_loss_proxy", "--out", tmp_path / "scores", *text)
    scores = ("--scores", tmp_path / "scores" / "scores.safetensors")
    ok("prune", checkpoint, "-m", "wanda", *scores, "--sparsity", 0.25, "--out", tmp_path / "smaller", *text)
    assert "dense" in ok("eval", tmp_path / "smaller", *text).stdout
    assert "metric wanda" in ok("plan", "show", tmp_path / "smaller" / "ffnscope_plan.json").stdout
    again = ok("inspect", tmp_path / "smaller").stdout
    assert f"{LAYERS} FFNs, {LAYERS * 36} channels" in again


def test_a_plan_of_a_run_prunes(
    ok: Ok, decided: tuple[Any, ...], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    result = quiet_run(config_from_dict(small_run(checkpoint, texts, tmp_path / "run")))
    ok(*decided, "--plan", result.folder / "plans" / "scar_loss_proxy-0.5.json")
    plan = read_plan(tmp_path / "out" / "ffnscope_plan.json")
    expected = result.plans["scar_loss_proxy-0.5"]
    assert all(torch.equal(kept, expected.kept[site]) for site, kept in plan.kept.items())
