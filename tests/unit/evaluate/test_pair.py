"""What makes a dense and a pruned model a pair, and the exact share that was removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import ffnscope
from checkpoints import small_tokenizer
from ffnscope.errors import UsageError
from ffnscope.evaluate.pair import check_alike, removed_parameters
from ffnscope.ffn.load import LoadedModel, ModelSource
from ffnscope.ffn.sites import find_sites
from ffnscope.types import Budget, PruningPlan
from tiny import D_FF, HIDDEN, LAYERS, tiny
from tiny_moe import EXPERT, N_EXPERTS, tiny_moe


def loaded(model: Any, name: str, tokenizer: Any = None) -> LoadedModel:
    return LoadedModel(model, tokenizer or small_tokenizer(), ModelSource(name), name)


def removed(dense: Any, pruned: Any, plan: PruningPlan | None = None) -> Any:
    return removed_parameters(dense, find_sites(dense), pruned, find_sites(pruned), plan)


@pytest.mark.parametrize("arch", ["llama", "llama_bias", "gpt2", "opt", "phi3", "gpt_neox"])
def test_what_is_removed_is_exactly_what_is_planned(arch: str, random_plan: Callable[..., PruningPlan]) -> None:
    dense, pruned = tiny(arch), tiny(arch)
    plan = random_plan(dense, 0.5)
    ffnscope.slice_(pruned, plan)
    found = removed(dense, pruned, plan)
    assert found.found == found.planned
    biases = {"llama_bias": 2, "gpt2": 1, "opt": 1, "gpt_neox": 1}.get(arch, 0)
    matrices = 3 if arch in ("llama", "llama_bias", "phi3") else 2
    assert found.found == LAYERS * D_FF // 2 * (matrices * HIDDEN + biases)
    bias_of_down = HIDDEN if biases else 0
    assert found.share == pytest.approx(0.5 * (1 - LAYERS * bias_of_down / found.dense))
    assert removed(dense, pruned) == type(found)(found.dense, found.found, None)


def test_unequal_widths_and_a_part_of_the_sites(random_plan: Callable[..., PruningPlan]) -> None:
    dense, pruned = tiny("llama"), tiny("llama")
    first, _ = find_sites(dense)
    plan = PruningPlan({first: torch.arange(7)}, "by hand", "by hand", Budget(0.4))
    ffnscope.slice_(pruned, plan)
    found = removed(dense, pruned, plan)
    assert found.found == found.planned == (D_FF - 7) * 3 * HIDDEN
    assert not found.padded


@pytest.mark.parametrize(("name", "biases"), [("mixtral", 0), ("gpt_oss", 2), ("dbrx", 0), ("jetmoe", 0)])
def test_fused_experts(name: str, biases: int, random_plan: Callable[..., PruningPlan]) -> None:
    dense, pruned = tiny_moe(name), tiny_moe(name)
    plan = random_plan(dense, 0.5)
    ffnscope.slice_(pruned, plan)
    found = removed(dense, pruned, plan)
    assert found.found == found.planned == 2 * N_EXPERTS * EXPERT // 2 * (3 * HIDDEN + biases)
    assert not found.padded


def test_experts_with_zeroed_channels_are_called_padded() -> None:
    dense, pruned = tiny_moe("jetmoe"), tiny_moe("jetmoe")
    kept = {s: torch.arange(6 if s.expert else 8) for s in find_sites(dense)}
    plan = PruningPlan(kept, "by hand", "by hand", Budget(0.5))
    with pytest.warns(UserWarning, match="experts of one layer lie in one tensor"):
        ffnscope.slice_(pruned, plan)
    found = removed(dense, pruned, plan)
    assert found.padded
    assert found.found == 2 * N_EXPERTS * 8 * 3 * HIDDEN
    assert found.planned == found.found + 2 * (N_EXPERTS - 1) * 2 * 3 * HIDDEN


def test_experts_that_compute_nothing_are_of_no_ffn(random_plan: Callable[..., PruningPlan]) -> None:
    dense, pruned = tiny_moe("longcat_flash"), tiny_moe("longcat_flash")
    plan = random_plan(dense, 0.5)
    ffnscope.slice_(pruned, plan)
    found = removed(dense, pruned, plan)
    assert found.found == found.planned == sum(s.d_ff // 2 * 3 * HIDDEN for s in plan.kept)
    assert not found.padded


def test_wider_than_planned_with_weights_that_are_not_zero_raises() -> None:
    dense, pruned = tiny("llama"), tiny("llama")
    first, second = find_sites(dense)
    plan = PruningPlan({first: torch.arange(7), second: torch.arange(20)}, "by hand", "by hand", Budget(0.7))
    ffnscope.prune_(pruned, plan, pad_to_widest=True)
    with torch.no_grad():
        pruned.model.layers[0].mlp.up_proj.weight[:8] = 1
    with pytest.raises(UsageError, match="has 20 channels in the pruned model, but the plan leaves 7"):
        removed(dense, pruned, plan)


def test_a_padded_model_is_called_that() -> None:
    dense, pruned = tiny("llama"), tiny("llama")
    first, second = find_sites(dense)
    plan = PruningPlan({first: torch.arange(7), second: torch.arange(20)}, "by hand", "by hand", Budget(0.7))
    ffnscope.prune_(pruned, plan, pad_to_widest=True)
    found = removed(dense, pruned, plan)
    assert found.padded
    assert found.found == 2 * (D_FF - 20) * 3 * HIDDEN
    assert found.planned == (2 * D_FF - 27) * 3 * HIDDEN


def test_another_plan_raises(random_plan: Callable[..., PruningPlan]) -> None:
    dense, pruned = tiny("llama"), tiny("llama")
    ffnscope.slice_(pruned, random_plan(dense, 0.5))
    message = "model.layers.0.mlp has 24 channels in the pruned model, but the plan leaves 36"
    with pytest.raises(UsageError, match=message):
        removed(dense, pruned, random_plan(dense, 0.25))
    with pytest.raises(
        UsageError, match=r"the plan was made for model.layers.0.mlp with 24 channels; the dense model has"
    ):
        removed(dense, pruned, random_plan(pruned, 0.5))


def test_the_wrong_way_round_raises(random_plan: Callable[..., PruningPlan]) -> None:
    dense, pruned = tiny("llama"), tiny("llama")
    ffnscope.slice_(pruned, random_plan(dense, 0.5))
    with pytest.raises(UsageError, match=r"48 channels in the pruned model and 24 in the dense one. Give the dense"):
        removed(pruned, dense)


def test_models_that_differ_elsewhere_raise() -> None:
    with pytest.raises(UsageError, match=r"differ in more than FFN width: model.layers.0.self_attn.k_proj.weight is"):
        removed(tiny("llama"), tiny("llama", num_key_value_heads=4))
    with pytest.raises(UsageError, match=r"model.layers.1.*missing in the pruned one"):
        removed(tiny("llama"), tiny("llama", num_hidden_layers=1))


def test_a_model_is_a_pair_with_itself() -> None:
    model = tiny("llama")
    check_alike(loaded(model, "a"), loaded(model, "b"))
    assert removed(model, model).share == 0


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (lambda: tiny("qwen2"), "model_type is 'llama' in a and 'qwen2' in b. Give a model and its own pruned form."),
        (lambda: tiny("llama", vocab_size=65), "vocabulary size is 64 in a and 65 in b"),
        (
            lambda: tiny("llama", dtype=torch.bfloat16),
            "dtype is 'float32' in a and 'bfloat16' in b. Give both the same",
        ),
        (lambda: tiny("llama").to("meta"), "device is 'cpu' in a and 'meta' in b"),
        (
            lambda: tiny("llama", attn_implementation="eager"),
            "attention implementation is 'sdpa' in a and 'eager' in b",
        ),
    ],
)
def test_models_that_are_not_alike_raise(other: Callable[[], Any], complaint: str) -> None:
    with pytest.raises(UsageError) as error:
        check_alike(loaded(tiny("llama"), "a"), loaded(other(), "b"))
    assert complaint in str(error.value)


def test_other_tokenizers_raise() -> None:
    other = small_tokenizer()
    other.add_tokens(["more"])
    with pytest.raises(UsageError, match="tokenizers of a and b map tokens to different ids"):
        check_alike(loaded(tiny("llama"), "a"), loaded(tiny("llama"), "b", other))
