"""Experts that are modules in a list: found, counted by the tokens routed to them, masked, cut and saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffnscope.apply.export import prune_, save_model
from ffnscope.apply.mask import masked
from ffnscope.apply.selfcheck import check_cut
from ffnscope.apply.slice import slice_
from ffnscope.calibrate.capture import CaptureOptions, capture, capture_size
from ffnscope.calibrate.collect import PassOptions, calibrate
from ffnscope.calibrate.observe import sum_nll
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import LayoutError, NonFiniteError
from ffnscope.ffn.sites import find_sites
from ffnscope.ffn.survey import survey
from ffnscope.plan.build import build_plan
from ffnscope.scoring import score
from ffnscope.types import Budget, ChannelStats, FFNSite, PruningPlan
from reference import padded
from tiny import logits
from tiny_listed import ListedForCausalLM, tiny_listed
from tiny_moe import EXPERT, N_EXPERTS, TOP_K

MakePlan = Callable[..., PruningPlan]
DISPATCHES = ["index", "leading", "mask", "sorted", "twice", "named"]
METRICS = ["activation_mean", "activation_l2_norm", "llm_pruner", "scar_loss_proxy"]


def slow_rows(model: Any, windows: Windows) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """h of every expert, token by token, and which valid tokens these are."""
    given: dict[str, Tensor] = {}
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, args, i=i: given.__setitem__(i, args[0].detach().clone()))
        for i, layer in enumerate(model.model.layers)
    ]
    model(windows.input_ids)
    for handle in handles:
        handle.remove()
    rows: dict[str, list[Tensor]] = {}
    tokens: dict[str, list[int]] = {}
    for i, layer in enumerate(model.model.layers):
        for number, x in enumerate(given[i][windows.valid]):
            for e in layer.mlp.route(x[None])[1][0].tolist():
                expert, name = layer.mlp.experts[e], f"model.layers.{i}.mlp.experts.{e}"
                rows.setdefault(name, []).append(nn.functional.silu(expert.w1(x)) * expert.w3(x))
                tokens.setdefault(name, []).append(number)
    return {n: torch.stack(r) for n, r in rows.items()}, {n: torch.tensor(t) for n, t in tokens.items()}


@pytest.mark.parametrize("dispatch", DISPATCHES)
class TestStatistics:
    def test_experts_are_found(self, dispatch: str) -> None:
        model = tiny_listed(dispatch)
        found = survey(model)
        assert not found.refused
        assert [s.name for s in found.sites] == [
            f"model.layers.{i}.mlp.experts.{e}" for i in range(2) for e in range(N_EXPERTS)
        ]
        assert {(s.gate, s.up, s.down, s.storage, s.d_ff) for s in found.sites} == {
            ("w1", "w3", "w2", "modules", EXPERT)
        }
        assert [s.expert for s in found.sites] == [*range(N_EXPERTS)] * 2

    def test_only_routed_tokens_count(self, dispatch: str) -> None:
        model, windows = tiny_listed(dispatch).double(), padded([16, 9, 4, 13])
        with torch.no_grad():
            rows, _ = slow_rows(model, windows)
        stats = calibrate(model, windows, METRICS, options=PassOptions(batch_size=3))
        for site, found in stats.items():
            h = rows.get(site.name, torch.zeros(0, EXPERT, dtype=torch.float64))
            assert found.counts["act_sq"] == len(h)
            assert torch.allclose(found.values["act_sq"].double(), (h * h).sum(0), rtol=1e-6)
        counts = [sum(f.counts["act_sq"] for s, f in stats.items() if s.layer == i) for i in range(2)]
        assert counts == [TOP_K * windows.n_tokens] * 2

    def test_gradients_are_those_of_autograd(self, dispatch: str) -> None:
        model, windows = tiny_listed(dispatch).double(), padded([16, 9, 4, 13])
        stats = calibrate(model, windows, METRICS, options=PassOptions(batch_size=3))
        model.requires_grad_(requires_grad=True)
        sum_nll(model(windows.input_ids).logits, windows).backward()
        for site, found in stats.items():
            down = model.get_submodule(site.path).w2.weight
            signed = (down.detach() * down.grad).sum(0)  # the sum over tokens of h * g
            assert torch.allclose(found.values["taylor_sum"].double(), signed, rtol=1e-5, atol=1e-9)

    def test_a_capture_tells_the_tokens(self, dispatch: str, tmp_path: Path) -> None:
        model, windows = tiny_listed(dispatch).double(), padded([16, 9, 4, 13])
        with torch.no_grad():
            rows, tokens = slow_rows(model, windows)
        found = capture(model, windows, tmp_path / "c", gradients=True, options=CaptureOptions(batch_size=3))
        for site in found.sites:
            order = found.tokens(site).argsort()
            assert torch.equal(found.tokens(site)[order], tokens[site.name])
            assert torch.allclose(found.h(site)[order], rows[site.name])
            assert found.g(site).shape == found.h(site).shape
        assert sum(p.stat().st_size for p in found.parts) < capture_size(model, windows, gradients=True) + 20_000


def test_mask_equals_slice_with_widths_of_their_own(random_plan: MakePlan) -> None:
    model = tiny_listed()
    sites = find_sites(model)
    plan, other = (_uneven(sites, seed) for seed in (1, 2))
    dense = logits(model)
    with masked(model, plan):
        expected = logits(model)
    sliced = slice_(tiny_listed(), plan)
    assert float((logits(sliced) - expected).abs().max()) < 1e-5
    assert float((expected - dense).abs().max()) > 1e-2
    assert float((logits(slice_(tiny_listed(), other)) - expected).abs().max()) > 1e-2
    assert [s.d_ff for s in find_sites(sliced)] == list(plan.widths.values())
    assert torch.equal(logits(model), dense)


def _uneven(sites: list[FFNSite], seed: int) -> PruningPlan:
    random = torch.Generator().manual_seed(seed)
    kept = {s: torch.randperm(s.d_ff, generator=random)[: 4 + (i % 3) * 4].sort().values for i, s in enumerate(sites)}
    return PruningPlan(kept, "random", "by hand", Budget(0.5))


def test_the_check_before_a_cut_tries_the_experts_of_a_layer_together() -> None:
    model = tiny_listed()
    (check,) = check_cut(model, find_sites(model))
    assert check.difference < 1e-5 < check.effect


def test_one_width_is_saved_for_its_own_class(random_plan: MakePlan, tmp_path: Path) -> None:
    model = tiny_listed()
    plan = random_plan(model, 0.5)
    save_model(prune_(model, plan), None, tmp_path / "out", plan=plan)
    again = ListedForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.config.intermediate_size == EXPERT // 2
    assert torch.equal(logits(again), logits(model))


def test_different_widths_are_saved_padded(tmp_path: Path) -> None:
    model = tiny_listed()
    plan = _uneven(find_sites(model), 1)
    with masked(model, plan):
        expected = logits(model)
    save_model(prune_(model, plan, pad_to_widest=True), None, tmp_path / "out", plan=plan)
    again = ListedForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert {s.d_ff for s in find_sites(again)} == {12}
    assert float((logits(again) - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("dispatch", ["all", "repeated"])
def test_what_cannot_be_followed_is_refused(dispatch: str) -> None:
    why = r"model.layers.\*.mlp.experts.*the tokens that an expert is given cannot be told, because they are not picked"
    with pytest.raises(LayoutError, match=why):
        find_sites(tiny_listed(dispatch))


def test_an_expert_without_tokens_is_left_whole() -> None:
    model, windows = tiny_listed(), padded([16, 9])
    for layer in model.model.layers:
        layer.mlp.route = _never_the_last(layer.mlp)
    stats: dict[FFNSite, ChannelStats] = calibrate(model, windows, ["scar_loss_proxy"])
    assert [s.expert for s, found in stats.items() if found.n_tokens == 0] == [3, 3]
    with pytest.warns(UserWarning, match="reached by no calibration token"):
        plan = build_plan(score(model, stats, "scar_loss_proxy"), 0.5)
    assert [w for s, w in plan.widths.items() if s.expert == 3] == [EXPERT] * 2


def _never_the_last(block: Any) -> Any:
    def route(hidden: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = block.gate(hidden)[:, :-1].softmax(-1).topk(block.top_k, dim=-1)
        return weights, index

    return route


def test_an_overflow_is_told_as_that() -> None:
    model, windows = tiny_listed(), padded([16, 9])
    sites = find_sites(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[windows.input_ids[0, 3]] = float("nan")
    with pytest.raises(NonFiniteError, match=r"activation of model.layers.0.mlp.experts.\d is NaN or infinite"):
        calibrate(model, windows, METRICS, sites=sites)


def test_all_is_as_before() -> None:
    model = tiny_listed()
    before = logits(model)
    calibrate(model, padded([16, 9]), METRICS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(logits(model), before)
