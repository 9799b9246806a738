from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from ffnscope.errors import LayoutError
from ffnscope.ffn.expert_calls import Call, expert_calls, group_experts
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from tiny import HIDDEN, logits, tiny, tokens
from tiny_moe import DENSE, EXPERT, MIXTURES, N_EXPERTS, SHARED, tiny_moe, up_first, up_first_forward

GATE_UP = ("gate_up_proj", "gate_up_proj", "down_proj")
# name -> (gate, up, down, order in a fused projection, storage) of routed experts
LAYOUTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(MIXTURES, (*GATE_UP, "gate_up", "linear")),
    "nemotron_h": (None, "up_proj", "down_proj", None, "linear"),
    "gpt_oss": (*GATE_UP, "interleaved", "transposed"),
    "aria_text": (*GATE_UP, "gate_up", "transposed"),
    "llama4_text": (*GATE_UP, "gate_up", "transposed"),
    "dbrx": ("mlp.w1", "mlp.v1", "mlp.w2", None, "flat"),
    "jetmoe": ("input_linear.weight", "input_linear.weight", "output_linear.weight", "gate_up", "linear"),
}
DENSE_WIDTHS = {
    "qwen2_moe": [SHARED, SHARED],
    "deepseek_v3": [DENSE, EXPERT],
    "nemotron_h": [SHARED, SHARED, DENSE],
    "aria_text": [2 * EXPERT] * 2,
    "llama4_text": [EXPERT] * 2,
    "longcat_flash": [DENSE] * 2,
}


@pytest.mark.parametrize("name", MIXTURES)
class TestFinds:
    def test_layout_of_routed_experts(self, name: str) -> None:
        sites = [s for s in find_sites(tiny_moe(name)) if s.expert is not None and "shared" not in s.path]
        assert {(s.gate, s.up, s.down, s.fused, s.storage) for s in sites} == {LAYOUTS[name]}
        assert {(s.d_model, s.d_ff) for s in sites} == {(HIDDEN, EXPERT)}
        layers = Counter(s.path for s in sites)
        assert layers
        assert set(layers.values()) == {N_EXPERTS}
        assert [s.expert for s in sites] == [*range(N_EXPERTS)] * len(layers)
        assert len({s.name for s in sites}) == len(sites)
        assert all(f".experts.{s.expert}" in s.name and str(s.layer) in s.path.split(".") for s in sites)

    def test_shared_experts_and_dense_layers_are_ordinary_sites(self, name: str) -> None:
        dense = [s for s in find_sites(tiny_moe(name)) if s.expert is None]
        assert [s.d_ff for s in dense] == DENSE_WIDTHS.get(name, [])

    def test_leaves_no_trace(self, name: str) -> None:
        model = tiny_moe(name)
        model.train()
        before, grads = model.config._experts_implementation, [p.requires_grad for p in model.parameters()]
        find_sites(model)
        assert model.config._experts_implementation == before
        assert [p.requires_grad for p in model.parameters()] == grads
        assert model.training
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_weights_make_the_channels(self, name: str) -> None:
        model = tiny_moe(name)
        groups, seen = group_experts(find_sites(model)), []

        def look(call: Call, run: Any) -> Any:
            if call.is_down:
                seen.extend((groups[call.experts][p.expert], p.rows(call.x), p.rows(run(call.x))) for p in call.parts)
            return run(call.x)

        with expert_calls(model, list(groups), look), torch.no_grad():
            model(tokens(), use_cache=False)
        assert seen
        for site, h, y in seen:
            down = weights_of(model, site).down
            assert h.shape[1:] == (site.d_ff,)
            assert torch.allclose(h @ down.T, y, atol=1e-5)


def test_shared_experts_in_fused_parameters_see_every_token():
    sites = [s for s in find_sites(tiny_moe("inkling_text")) if "shared" in s.path]
    assert [s.name.removeprefix("model.layers.0.mlp.") for s in sites[:2]] == [
        "shared_experts.experts.0",
        "shared_experts.experts.1",
    ]
    assert {(s.gate, s.up, s.down, s.fused) for s in sites} == {("gate_proj", "up_proj", "down_proj", None)}


def test_tracked_selects_experts_by_name():
    model = tiny_moe("qwen2_moe")
    found = find_sites(model, ["layers.1.mlp.experts.2", "layers.*.mlp.shared_expert.down_proj"])
    assert [s.name for s in found] == [
        "model.layers.0.mlp.shared_expert",
        "model.layers.1.mlp.experts.2",
        "model.layers.1.mlp.shared_expert",
    ]


def test_an_expert_that_the_probe_does_not_reach_has_the_layout_of_its_siblings():
    model = tiny_moe("deepseek_v3")
    model.model.layers[1].mlp.gate.e_score_correction_bias[1:3] = -1e4
    assert [s.expert for s in find_sites(model) if s.expert is not None] == [0, 1, 2, 3]


def test_experts_without_weights_alone_leave_the_layout_unknown():
    model = tiny_moe("longcat_flash")
    model.model.layers[0].mlp.router.e_score_correction_bias[:N_EXPERTS] = -1e4
    with pytest.warns(
        UserWarning, match=r"no product of tokens with model.layers.\*.mlp.experts.down_proj was seen, so"
    ):
        found = find_sites(model)
    assert [s.d_ff for s in found] == [DENSE] * len(found)


def test_experts_beside_unknown_parameters_are_left_whole() -> None:
    model = tiny_moe("mixtral")
    model.model.layers[1].mlp.experts.extra = nn.Parameter(torch.zeros(4, 2, 2))
    with pytest.warns(
        UserWarning,
        match=r"left whole in MixtralForCausalLM: .*.experts.extra: \(4, 2, 2\) is not known to",
    ):
        found = find_sites(model)
    assert [s.layer for s in found] == [0] * N_EXPERTS


def test_experts_in_a_list_that_all_get_all_tokens_are_left_whole() -> None:
    model = tiny("llama")
    mlp = model.model.layers[1].mlp
    mlp.experts = nn.ModuleList([tiny("llama").model.layers[0].mlp for _ in range(2)])
    mlp.forward = lambda x: sum(expert(x) for expert in mlp.experts)
    with pytest.warns(UserWarning, match=r"model.layers.\*.mlp.experts: .*: the tokens that an expert is given cannot"):
        found = find_sites(model)
    assert [s.path for s in found] == ["model.layers.0.mlp"]


def test_channels_that_depend_on_each_other_are_left_whole() -> None:
    model = tiny_moe("mixtral")
    model.model.layers[0].mlp.experts.act_fn = nn.Softmax(-1)
    with pytest.warns(UserWarning, match=r"the channels of model.layers.\*.mlp.experts .* depend on each other"):
        found = find_sites(model)
    assert [s.layer for s in found] == [1] * N_EXPERTS


def test_nothing_but_refused_experts() -> None:
    model = tiny_moe("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = nn.Softmax(-1)
    with pytest.raises(LayoutError, match=r"none of the FFNs of MixtralForCausalLM .* depend on each other"):
        find_sites(model)


def test_up_before_gate_is_measured():
    assert {s.fused for s in find_sites(up_first(tiny_moe("mixtral")))} == {"up_gate"}


def test_tokens_that_cannot_be_followed_are_refused():
    model = tiny_moe("mixtral")

    def doubled(self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return up_first_forward(self, torch.cat([hidden, hidden]), index, weights)[: len(hidden)]

    for layer in model.model.layers:
        layer.mlp.experts.__class__ = type("Doubled", (type(layer.mlp.experts),), {"forward": doubled})
    with pytest.raises(LayoutError, match=r"can be cut.*: the tokens that an expert is given cannot be told"):
        find_sites(model)


def test_all_is_as_before_after_an_exception():
    model = tiny_moe("mixtral")
    dense, groups = logits(model), group_experts(find_sites(model))

    def stop(call: Call, run: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), expert_calls(model, list(groups), stop):
        model(tokens())
    assert model.config._experts_implementation == "grouped_mm"
    assert torch.equal(logits(model), dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
