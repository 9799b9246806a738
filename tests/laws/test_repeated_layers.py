"""A model that runs the same layers several times per forward (HRM): statistics of all uses, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cuts import distance, logits
from ffnscope.analyze.ablation import ablate_channels
from ffnscope.apply.export import prune_, save_model
from ffnscope.apply.mask import masked
from ffnscope.apply.slice import slice_
from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.calibrate.capture import capture
from ffnscope.calibrate.collect import PassOptions, calibrate
from ffnscope.calibrate.memory import pass_bytes
from ffnscope.calibrate.observe import sum_nll
from ffnscope.errors import NotAvailableError, UsageError
from ffnscope.evaluate.costs import Work, count_costs
from ffnscope.evaluate.perplexity import token_losses
from ffnscope.ffn.projection import uses_of
from ffnscope.ffn.sites import find_sites
from ffnscope.registry import STATISTICS
from ffnscope.rules import Statistic
from ffnscope.types import Budget, PruningPlan
from reference import text
from tiny_all import D_FF, tiny_causal_lm

MakePlan = Callable[..., PruningPlan]
LOW, HIGH = "model.L_module.layers.0.mlp", "model.H_module.layers.0.mlp"


@pytest.fixture
def model() -> Any:
    return tiny_causal_lm("hrm_text, two cycles")


def test_how_often_each_runs(model: Any) -> None:
    found = find_sites(model)
    assert [(s.path, s.runs, s.n_uses) for s in found] == [(LOW, 4, 4), (HIGH, 2, 2)]
    assert [s.n_uses for s in find_sites(tiny_causal_lm("zamba2, two blocks"))] == [2, 2]
    assert uses_of(found[0]) == [found[0]]


def test_a_slice_is_a_mask_and_loads(model: Any, random_plan: MakePlan, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plan, other = random_plan(model), random_plan(model, seed=1)
    dense = logits(model)
    with masked(model, plan):
        expected = logits(model)
    assert distance(expected, dense) > 0.1
    assert distance(logits(slice_(copy.deepcopy(model), other)), expected) > 0.1
    prune_(model, plan)
    assert distance(logits(model), expected) < 1e-4
    save_model(model, None, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert distance(logits(loaded), logits(model)) == 0


def test_statistics_are_sums_over_all_runs(model: Any) -> None:
    sites, batch = find_sites(model), text(3)
    seen: dict[str, list[Tensor]] = {}

    def note(path: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            if args[0].requires_grad:
                args[0].retain_grad()
            seen.setdefault(path, []).append(args[0])

        return hook

    handles = [model.get_submodule(s.projections[-1]).register_forward_pre_hook(note(s.path)) for s in sites]
    with torch.enable_grad():
        sum_nll(model(input_ids=batch.input_ids).logits, batch).backward()
    for handle in handles:
        handle.remove()
    found = calibrate(model, batch, ["wanda", "scar_taylor"], options=PassOptions(batch_size=2))
    for site, stats in found.items():
        assert len(seen[site.path]) == site.n_uses
        h = [one.detach().flatten(0, -2).double() for one in seen[site.path]]
        g = [one.grad.flatten(0, -2).double() for one in seen[site.path] if one.grad is not None]
        assert stats.counts["act_sq"] == site.n_uses * batch.n_tokens
        assert torch.allclose(stats.total("act_sq"), torch.cat(h).square().sum(0), rtol=1e-4)
        taylor = torch.cat(h[-len(g) :]) * torch.cat(g)
        assert torch.allclose(stats.total("taylor_abs"), taylor.abs().sum(0), rtol=1e-3)


def test_a_channel_is_removed_from_all_runs(model: Any) -> None:
    site, windows = find_sites(model)[0], text(2)
    found = ablate_channels(model, {site: torch.tensor([3])}, windows, batch_size=4)
    everything = torch.arange(D_FF)
    plan = PruningPlan({site: everything[everything != 3]}, "test", "test", Budget(1 / D_FF))
    with torch.no_grad():
        dense = token_losses(model(input_ids=windows.input_ids).logits, windows)
        with masked(model, plan):
            change = token_losses(model(input_ids=windows.input_ids).logits, windows) - dense
    assert torch.allclose(found.change[site][0], change.sum(1).double(), atol=1e-4)
    assert float(change.abs().max()) > 1e-3


def test_memory_of_every_run(model: Any) -> None:
    sites = find_sites(model)
    once = find_sites(tiny_causal_lm("hrm_text"))
    more, less = (pass_bytes(found, ["taylor_sum"], 10, torch.float32) for found in (sites, once))
    assert more - less == 10 * D_FF * 4 * (3 + 1)


def test_what_cannot_work_is_refused_by_name(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = find_sites(model)
    with pytest.raises(NotAvailableError, match=f"{LOW} runs 4 times per forward, so a token has several activations"):
        capture(model, text(1), tmp_path / "capture")
    with pytest.raises(NotAvailableError, match=f"{LOW} of HrmTextForCausalLM runs 4 times per forward; FLOPs"):
        count_costs(model, sites, Work())
    with pytest.raises(NotAvailableError, match=f"{LOW} runs 4 times per forward, so it is no single branch"):
        calibrate(model, text(1), ["graph_backward"])
    STATISTICS.names()
    mixed = Statistic("mixed", lambda x, g: x.T @ g, ("x", "g"), "sum", ("d_model", "d_ff"), 1, "Made up.")
    monkeypatch.setitem(STATISTICS._items, "mixed", mixed)
    with pytest.raises(UsageError, match=r"'mixed' reads x, g together.*cannot be told which belong together. Leave"):
        Accumulator(sites, ["mixed"])
