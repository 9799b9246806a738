"""The check before a cut: it passes on what can be cut, stops what cannot, and leaves the model alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ffnscope.apply import selfcheck
from ffnscope.apply.export import prune_
from ffnscope.apply.selfcheck import check_cut
from ffnscope.errors import LayoutError
from ffnscope.ffn.sites import find_sites
from ffnscope.types import Budget, FFNSite, PruningPlan
from tiny import ARCHITECTURES, logits, tiny
from tiny_all import logits_of, tiny_causal_lm
from tiny_moe import MIXTURES, tiny_moe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_can_be_cut_passes(arch: str, dtype: torch.dtype) -> None:
    model = tiny(arch, dtype=dtype)
    (check,) = check_cut(model, find_sites(model))
    assert check.effect > 0.01
    assert check.difference <= 0.02 * check.effect


@pytest.mark.parametrize(
    "name",
    ["gemma4_text, double width", "musicgen", "recurrent_gemma", "bart", "hrm_text", "bitnet", "zamba", "zamba2"],
)
def test_other_layouts_pass(name: str) -> None:
    model = tiny_causal_lm(name)
    assert all(c.difference < 1e-4 < c.effect for c in check_cut(model, find_sites(model)))


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_pass(name: str) -> None:
    model = tiny_moe(name)
    checks = check_cut(model, find_sites(model))
    assert any(c.site.expert is not None for c in checks)
    assert all(c.difference < 1e-4 < c.effect for c in checks)


def test_experts_of_the_wrong_order_stop_it() -> None:
    model = tiny_moe("gpt_oss")
    sites = [replace(s, fused="gate_up") for s in find_sites(model)]
    with pytest.raises(LayoutError, match=r"model.layers.0.mlp.experts.0 of GptOssForCausalLM .* cannot be cut"):
        check_cut(model, sites)


def test_one_site_of_each_kind() -> None:
    model = tiny_causal_lm("gemma4_text, double width")
    sites = find_sites(model)
    assert [(c.site.layer, c.site.d_ff) for c in check_cut(model, sites)] == [(0, 168), (3, 336)]
    assert [c.site.layer for c in check_cut(model, sites[1:3])] == [1]


def site_of(model: Any, d_ff: int, layer: int = 0) -> FFNSite:
    """What the names alone would call an FFN."""
    path = f"model.layers.{layer}.mlp"
    return FFNSite(layer, path, "gate_proj", "up_proj", "down_proj", model.config.hidden_size, d_ff)


def test_a_norm_that_is_as_wide_as_the_channels_stops_it() -> None:
    model = tiny_causal_lm("bitnet")  # as if the norm had not been seen
    message = (
        r"model.layers.0.mlp of BitNetForCausalLM \(model_type 'bitnet'\) cannot be cut: .*fails with: The size of"
    )
    with pytest.raises(LayoutError, match=message):
        check_cut(model, [site_of(model, 168)])


@pytest.mark.filterwarnings("ignore:left whole in Llama")
def test_channels_that_depend_on_each_other_stop_it() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.act_fn = torch.nn.Softmax(-1)
    message = r"cannot be cut: .* differs by [\d.]+ from .* \(masking moves it by [\d.]+\).*The model was not changed"
    with pytest.raises(LayoutError, match=message):
        check_cut(model, [site_of(model, 48)])


@pytest.mark.filterwarnings("ignore:left whole in Llama")
def test_a_model_is_checked_before_it_is_pruned() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.act_fn = torch.nn.Softmax(-1)
    site = site_of(model, 48)
    plan = PruningPlan({site: torch.arange(24)}, "random", "local", Budget(0.5), {}, {})
    with pytest.raises(LayoutError, match="cannot be cut"):
        prune_(model, plan)
    assert model.model.layers[0].mlp.up_proj.weight.shape[0] == 48


def test_a_wrong_order_of_halves_in_the_cut_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("phi3")
    (site, *_) = find_sites(model)

    def cut_other_channels(clone: Any, plan: Any) -> Any:
        shifted = {site: torch.arange(site.d_ff)[: plan.kept[site].numel()]}
        return original(clone, replace(plan, kept=shifted))

    original = selfcheck.slice_
    monkeypatch.setattr(selfcheck, "slice_", cut_other_channels)
    with pytest.raises(LayoutError, match="cannot be cut"):
        check_cut(model, [site])


def test_a_use_that_is_not_cut_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_causal_lm("zamba")
    (site,) = find_sites(model)
    whole = model.get_submodule(site.twins[0]).down_proj

    def cut_the_first_use(clone: Any, plan: Any) -> Any:
        untied = original(clone, plan).get_submodule(site.twins[0])
        untied.down_proj.weight = torch.nn.Parameter(whole.weight[:, : plan.kept[site].numel()].clone())
        return clone

    original = selfcheck.slice_
    monkeypatch.setattr(selfcheck, "slice_", cut_the_first_use)
    with pytest.raises(LayoutError, match="cannot be cut"):
        check_cut(model, [site])


def test_the_model_stays_as_it_was() -> None:
    model = tiny("gpt2").train()
    before, config = {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()
    parameters = dict(model.named_parameters())
    expected = logits(model.eval())
    model.train()
    check_cut(model, find_sites(model))
    assert model.training
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.config.to_dict() == config
    assert (model.transformer.h[0].mlp.c_fc.nf, torch.equal(logits(model.eval()), expected)) == (48, True)


def test_only_the_tried_site_is_copied() -> None:
    model = tiny("llama")
    (site, *_) = find_sites(model)
    clone = selfcheck._sharing(model, [site])
    copied = [n for n, p in clone.named_parameters() if p is not model.get_parameter(n)]
    assert copied == [f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
    assert clone.lm_head.weight is model.lm_head.weight


def test_after_a_forward_that_kept_its_graph() -> None:
    model = tiny_causal_lm("recurrent_gemma")
    sites = find_sites(model)
    logits_of(model).sum()
    assert len(check_cut(model, sites)) == 1
