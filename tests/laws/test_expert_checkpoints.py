"""A mixture with narrower experts loads by plain `transformers` where its config can express the width."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ffnscope.apply.export import prune_, save_model
from ffnscope.ffn.sites import find_sites
from ffnscope.types import PruningPlan
from tiny import logits
from tiny_moe import EXPERT, MIXTURES, tiny_moe

MakePlan = Callable[..., PruningPlan]


@pytest.mark.parametrize("name", MIXTURES)
def test_plain_transformers_loads_narrower_experts(name: str, random_plan: MakePlan, tmp_path: Path) -> None:
    model = tiny_moe(name)
    plan = random_plan(model, 0.5)
    prune_(model, plan)
    save_model(model, None, tmp_path / "out", plan=plan)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert float((logits(again) - logits(model)).abs().max()) < 1e-5
    assert [(s.name, s.d_ff) for s in find_sites(again)] == [(s.name, s.d_ff // 2) for s in plan.kept]
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


def test_layers_of_different_widths_bring_their_code(random_plan: MakePlan, tmp_path: Path) -> None:
    model = tiny_moe("qwen3_moe")
    kept = {s: torch.arange(8 if s.layer else EXPERT) for s in find_sites(model)}
    plan = PruningPlan(kept, "by hand", "by hand", random_plan(model).budget)
    dense = copy.deepcopy(model)
    prune_(model, plan)
    save_model(model, None, tmp_path / "out", plan=plan)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert float((logits(again) - logits(model)).abs().max()) < 1e-5
    assert float((logits(again) - logits(dense)).abs().max()) > 1e-2
    with pytest.raises(RuntimeError, match="size"):
        _plain(tmp_path / "out", type(dense))


def _plain(path: Path, kind: Any) -> Any:
    return kind.from_pretrained(path)
