"""``prune --reconstruct bias``: what is saved in each format, how it is labelled, what is refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM

import ffnscope
from checkpoints import VOCABULARY, small_tokenizer
from ffnscope.io import read_plan
from tiny import tiny, tokens
from tiny_all import tiny_causal_lm

Ok = Callable[..., Result]
Fails = Callable[..., str]
BIAS = ("-m", "wanda", "--sparsity", 0.5, "--reconstruct", "bias")


@pytest.fixture
def options(texts: Path, tmp_path: Path) -> tuple[Any, ...]:
    numbers = ("--num-samples", 16, "--max-length", 32, "--batch-size", 4, "--device", "cpu")
    return (*BIAS, "--no-evaluate", "--text", texts / "train.txt", *numbers)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def expected(checkpoint: Path, texts: Path) -> tuple[torch.Tensor, ffnscope.Reconstruction]:
    """What the compensated model computes, made by the Python functions."""
    loaded = ffnscope.load_model(ffnscope.ModelSource(str(checkpoint), device="cpu"))
    source = ffnscope.TextSource(str(texts / "train.txt"))
    windows = ffnscope.load_windows(source, loaded.tokenizer, n=16, length=32, seed=42)
    stats = ffnscope.collect(loaded.model, windows, ["act_sum", "act_sq"])
    plan = ffnscope.build_plan(ffnscope.score(loaded.model, stats, "wanda"), 0.5)
    made = ffnscope.compensate_bias(loaded.model, plan, stats)
    with ffnscope.reconstructed(loaded.model, made):
        return logits(loaded.model), made


def test_a_checkpoint_that_plain_transformers_loads(
    ok: Ok, options: tuple[Any, ...], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = ok("prune", checkpoint, *options, "--out", out)
    assert "reconstruct (bias): " in result.stderr and "Layer error profile" not in result.stdout
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.mlp_bias is True
    assert torch.allclose(logits(model), expected(checkpoint, texts)[0], atol=1e-5)
    plan = read_plan(out / "ffnscope_plan.json")
    assert plan.provenance["reconstruction"]["method"] == "means of removed channels as a bias"
    assert "| kind | mean bias |" in (out / "README.md").read_text()


def test_it_is_labelled_where_it_is_measured(ok: Ok, checkpoint: Path, tmp_path: Path) -> None:
    numbers = ("--text", "pydoc_topics", "--num-samples", 8, "--max-length", 64, "--device", "cpu")
    result = ok("prune", checkpoint, *BIAS, *numbers, "--out", tmp_path / "out")
    assert "wanda + mean bias" in result.stdout


@pytest.mark.parametrize("form", ["decilm", "gguf"])
def test_other_formats(
    ok: Ok, options: tuple[Any, ...], checkpoint: Path, texts: Path, tmp_path: Path, form: str
) -> None:
    out = tmp_path / f"out.{form}"
    means = expected(checkpoint, texts)[1].bias
    if form == "gguf":
        with pytest.warns(UserWarning, match="holds biases of FFNs"):
            ok("prune", checkpoint, *options, "--format", form, "--out", out)
        import gguf

        found = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(out).tensors}
        names = [f"blk.{i}.ffn_down.bias" for i in range(len(means))]
    else:
        ok("prune", checkpoint, *options, "--format", form, "--out", out)
        from safetensors.torch import load_file

        found = load_file(out / "model.safetensors")
        names = [f"model.layers.{i}.mlp.down_proj.bias" for i in range(len(means))]
    for name, bias in zip(names, means.values(), strict=True):
        assert torch.allclose(found[name], bias, atol=1e-6)


def test_a_layout_with_a_bias(ok: Ok, options: tuple[Any, ...], tmp_path: Path) -> None:
    model, out = tmp_path / "gpt2", tmp_path / "out"
    tiny("gpt2", vocab_size=VOCABULARY).save_pretrained(model)
    small_tokenizer().save_pretrained(model)
    before = AutoModelForCausalLM.from_pretrained(model).transformer.h[0].mlp.c_proj.bias
    ok("prune", model, *options, "--out", out)
    after = AutoModelForCausalLM.from_pretrained(out).transformer.h[0].mlp.c_proj.bias
    assert not torch.equal(before, after)


def test_a_family_without_a_place_for_it_is_refused_before_the_pass(
    fails: Fails, options: tuple[Any, ...], tmp_path: Path
) -> None:
    model = tmp_path / "qwen2"
    tiny_causal_lm("qwen2").save_pretrained(model)
    small_tokenizer().save_pretrained(model)
    written = fails(2, "prune", model, *options, "--out", tmp_path / "out")
    assert "no field of its config gives them one" in written and "a run without checkpoints" in written
    assert "calibrate" not in written and not (tmp_path / "out").exists()
