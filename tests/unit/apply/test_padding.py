"""FFNs whose widths one config field sets shrink by one share, so that the checkpoint loads by stock code."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ffnscope.apply.export import prune_, save_model
from ffnscope.apply.mask import masked
from ffnscope.apply.padding import field_widths, zeroed_channels
from ffnscope.evaluate.pair import removed_parameters
from ffnscope.ffn.sites import find_sites
from ffnscope.types import PruningPlan
from tiny import logits, tiny
from tiny_moe import EXPERT, tiny_moe

MakePlan = Callable[..., PruningPlan]
SHARES = "one config field sets the widths of several kinds of FFN"
# routed and shared experts, routed experts and dense layers: one field for both
COUPLED = {
    "deepseek_v3": {"n_shared_experts": 2, "moe_intermediate_size": 24},
    "aria_text": {"intermediate_size": 24, "moe_num_shared_experts": 2},
}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("sparsity", [0.25, 0.3, 0.45])
def test_rounding_is_evened_out(name: str, sparsity: float, random_plan: MakePlan, tmp_path: Path) -> None:
    model = tiny_moe(name, **COUPLED[name])
    plan = random_plan(model, sparsity)
    with masked(model, plan):
        expected = logits(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=SHARES)
        prune_(model, plan)
    save_model(model, None, tmp_path / "out", plan=plan)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert float((logits(again) - expected).abs().max()) < 1e-5
    surplus = [s.d_ff - plan.kept[p].numel() for s, p in zip(find_sites(again), plan.kept, strict=True)]
    assert all(0 <= n <= 8 for n in surplus)
    dense = tiny_moe(name, **COUPLED[name])
    found = removed_parameters(dense, find_sites(dense), again, find_sites(again), plan)
    assert found.padded == (sum(surplus) > 0)


def test_what_is_zeroed_is_told(random_plan: MakePlan) -> None:
    model = tiny_moe("deepseek_v3", **COUPLED["deepseek_v3"])
    plan = random_plan(model, 0.25)  # 18 of 24 routed, which rows of 16 bytes make 20; 36 of 48 shared
    with pytest.warns(UserWarning, match=rf"{SHARES}.*12 removed channels in 5 FFNs are zeroed.*width 20, 2 zeroed"):
        prune_(model, plan)


def test_what_is_zeroed_is_in_the_card(random_plan: MakePlan, tmp_path: Path) -> None:
    model = tiny_moe("deepseek_v3", **COUPLED["deepseek_v3"])
    plan = random_plan(model, 0.25)
    with pytest.warns(UserWarning, match=SHARES):
        prune_(model, plan)
    assert zeroed_channels(model, plan) == 12
    save_model(model, None, tmp_path / "out", plan=plan)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| of these still in the files | 12 channels, as zeros, so that the widths fit together |\n" in card


def test_widths_that_fit_stay(random_plan: MakePlan) -> None:
    model = tiny_moe("deepseek_v3", **COUPLED["deepseek_v3"])
    plan = random_plan(model, 0.5)
    assert field_widths(model, plan).items() <= plan.widths.items()


def test_more_than_rounding_is_left_to_the_code(random_plan: MakePlan, tmp_path: Path) -> None:
    model = tiny_moe("deepseek_v3", **COUPLED["deepseek_v3"])
    plan = random_plan(model, 0.5)
    kept = {s: torch.arange(s.d_ff if s.d_ff == 2 * 24 else k.numel()) for s, k in plan.kept.items()}
    plan = PruningPlan(kept, "by hand", "by hand", plan.budget)
    assert field_widths(model, plan) == {}
    save_model(prune_(model, plan), None, tmp_path / "out", plan=plan)
    assert (tmp_path / "out" / "modeling_ffnscope.py").exists()


def test_padding_to_the_widest_takes_any_surplus(random_plan: MakePlan, tmp_path: Path) -> None:
    model = tiny_moe("deepseek_v3", **COUPLED["deepseek_v3"])
    plan = random_plan(model, 0.5)
    kept = {s: torch.arange(36 if s.d_ff == 2 * 24 else k.numel()) for s, k in plan.kept.items()}
    plan = PruningPlan(kept, "by hand", "by hand", plan.budget)
    with masked(model, plan):
        expected = logits(model)
    with pytest.warns(UserWarning, match=SHARES):
        prune_(model, plan, pad_to_widest=True)
    save_model(model, None, tmp_path / "out", plan=plan)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.config.moe_intermediate_size == 20
    assert float((logits(again) - expected).abs().max()) < 1e-5


def test_one_kind_of_ffn_is_not_searched(random_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    plan = random_plan(model, 0.3)
    monkeypatch.setattr("ffnscope.apply.padding.survey", None)
    assert field_widths(model, plan) == {}


def test_experts_alone_are_left_to_the_slice(random_plan: MakePlan) -> None:
    model = tiny_moe("mixtral")
    plan = random_plan(model, 0.3)
    assert set(plan.widths.values()) == {round(0.7 * EXPERT)}
    assert field_widths(model, plan) == {}
