"""Mixtures of experts from checkpoint to checkpoint by the commands prune and bench."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM

import ffnscope
from checkpoints import POSITIONS, VOCABULARY, small_tokenizer
from ffnscope.io import read_json, read_plan
from tiny import tokens
from tiny_listed import ListedConfig, ListedForCausalLM, tiny_listed
from tiny_moe import tiny_moe

Ok = Callable[..., Result]
Fails = Callable[..., str]
# only experts; shared experts beside them; a dense layer first; more than that in fused parameters with biases
MIXTURES = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss")
ZEROED = "ignore:(experts of one layer lie in one tensor|one config field sets the widths):UserWarning"


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def made(folder: Path, name: str) -> Path:
    return saved(folder, tiny_moe(name, vocab_size=VOCABULARY, max_position_embeddings=POSITIONS))


def pruning(model: Path, out: Path, texts: Path, *more: Any) -> tuple[Any, ...]:
    text = ("--text", texts / "train.txt", "--num-samples", 2, "--max-length", 32, "--no-evaluate")
    return ("prune", model, "--out", out, "-m", "wanda", "--device", "cpu", *text, *more)


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def check(dense: Any, pruned: Any, plan: ffnscope.PruningPlan) -> None:
    """Pruned equals masked, and masked is visible."""
    whole = outputs(dense)
    with ffnscope.masked(dense, plan):
        expected = outputs(dense)
    assert float((outputs(pruned) - expected).abs().max()) < 1e-5
    assert float((whole - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("name", MIXTURES)
def test_one_sparsity(ok: Ok, name: str, texts: Path, tmp_path: Path) -> None:
    dense = made(tmp_path / "dense", name)
    result = ok(*pruning(dense, tmp_path / "out", texts, "--sparsity", 0.5))
    assert "removed 0.5000 of the FFN channels (asked 0.5)\n" in result.stderr
    plan, pruned = (
        read_plan(tmp_path / "out" / "ffnscope_plan.json"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
    )
    check(AutoModelForCausalLM.from_pretrained(dense), pruned, plan)
    ok(*("bench", dense, tmp_path / "out", "--out", tmp_path / "speed.json", "--repeats", 2, "--warmup", 0),
       *("--prompt-length", 8, "--new-tokens", 2, "--no-memory"))  # fmt: skip
    removed = read_json(tmp_path / "speed.json")["removed"]
    assert removed["found"] == removed["planned"] > 0 and not removed["padded"]


@pytest.mark.filterwarnings(ZEROED)
@pytest.mark.parametrize("name", MIXTURES)
def test_a_global_plan(ok: Ok, name: str, texts: Path, tmp_path: Path) -> None:
    dense = made(tmp_path / "dense", name)
    result = ok(*pruning(dense, tmp_path / "out", texts, "--sparsity", 0.4, "--allocator", "global"))
    plan, loaded = read_plan(tmp_path / "out" / "ffnscope_plan.json"), ffnscope.load(str(tmp_path / "out"))
    check(AutoModelForCausalLM.from_pretrained(dense), loaded.model, plan)
    zeroed = sum(s.d_ff - plan.widths[p] for s, p in zip(ffnscope.find_sites(loaded.model), plan.kept, strict=True))
    assert zeroed > 0
    assert f"(asked 0.4); {zeroed} of them are zeros that are still in the files\n" in result.stderr


@pytest.mark.filterwarnings("default::UserWarning")
def test_what_is_zeroed_is_one_line_without_code(fails: Fails, texts: Path, tmp_path: Path) -> None:
    written = fails(0, *pruning(made(tmp_path / "dense", "mixtral"), tmp_path / "out", texts, "--sparsity", 0.3))
    (line,) = [line for line in written.splitlines() if "experts of one layer lie in one tensor" in line]
    assert line.startswith("warning: experts of one layer") and ".py" not in written


def test_experts_in_a_list_that_come_with_code(ok: Ok, texts: Path, tmp_path: Path) -> None:
    model = tiny_listed(vocab_size=VOCABULARY)
    ListedConfig.register_for_auto_class()
    ListedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    dense = saved(tmp_path / "dense", model)
    ok(*pruning(dense, tmp_path / "out", texts, "--sparsity", 0.5, "--trust-remote-code"))
    plan = read_plan(tmp_path / "out" / "ffnscope_plan.json")
    assert {s.storage for s in plan.kept} == {"modules"}
    check(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True), plan)
