from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from ffnscope.errors import LayoutError, ModelError, UsageError
from ffnscope.ffn.projection import down_projection, projection, weights_of
from ffnscope.ffn.sites import find_sites, select_sites
from ffnscope.types import FFNSite
from tiny import ARCHITECTURES, D_FF, FUSED, HIDDEN, LAYERS, PLAIN, logits, tiny, tokens

GATED = ("gate_proj", "up_proj", "down_proj")
EXPECTED = {
    "phi3": ("model.layers.{}.mlp", "gate_up_proj", "gate_up_proj", "down_proj"),
    "glm": ("model.layers.{}.mlp", "gate_up_proj", "gate_up_proj", "down_proj"),
    "opt": ("model.decoder.layers.{}", None, "fc1", "fc2"),
    "opt_projected": ("model.decoder.layers.{}", None, "fc1", "fc2"),
    "phi": ("model.layers.{}.mlp", None, "fc1", "fc2"),
    "gpt_neox": ("gpt_neox.layers.{}.mlp", None, "dense_h_to_4h", "dense_4h_to_h"),
    "gpt_neo": ("transformer.h.{}.mlp", None, "c_fc", "c_proj"),
    "gpt2": ("transformer.h.{}.mlp", None, "c_fc", "c_proj"),
    "starcoder2": ("model.layers.{}.mlp", None, "c_fc", "c_proj"),
    "falcon": ("transformer.h.{}.mlp", None, "dense_h_to_4h", "dense_4h_to_h"),
    "bert": ("bert.encoder.layer.{}", None, "intermediate.dense", "output.dense"),
    "bloom": ("transformer.h.{}.mlp", None, "dense_h_to_4h", "dense_4h_to_h"),
}


def channels_by_hand(model: Any, site: FFNSite) -> tuple[Tensor, Tensor]:
    """The channel activation as the model computes it, and as act(gate x) * (up x) of the canonical weights."""
    seen: dict[str, Tensor] = {}
    hooks = [
        down_projection(model, site).register_forward_pre_hook(lambda m, args: seen.update(h=args[0])),
        projection(model, site, site.up).register_forward_pre_hook(lambda m, args: seen.update(x=args[0])),
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    weights = weights_of(model, site)
    act = ACT2FN["gelu_pytorch_tanh" if site.activation == "unknown" else site.activation]
    up = torch.nn.functional.linear(seen["x"], weights.up, weights.up_bias)
    if weights.gate is None:
        return seen["h"], act(up)
    return seen["h"], act(torch.nn.functional.linear(seen["x"], weights.gate, weights.gate_bias)) * up


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture(arch: str) -> None:
    model = tiny(arch)
    sites = find_sites(model)
    path, gate, up, down = EXPECTED.get(arch, ("model.layers.{}.mlp", *GATED))
    width = (12, 48) if arch == "bloom" else (HIDDEN, D_FF)
    assert [(s.layer, s.path, s.gate, s.up, s.down, s.d_model, s.d_ff) for s in sites] == [
        (i, path.format(i), gate, up, down, *width) for i in range(LAYERS)
    ]
    assert {s.fused for s in sites} == ({"gate_up"} if arch in FUSED else {None})
    assert all((s.gate is None) == (arch in PLAIN) for s in sites)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_roles_and_activation_by_hand(arch: str) -> None:
    model = tiny(arch)
    for site in find_sites(model):
        found, expected = channels_by_hand(model, site)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", ["llama", "llama_relu", "gemma", "phi3", "opt", "gpt2"])
def test_the_dtype_changes_nothing(arch: str, dtype: torch.dtype) -> None:
    assert find_sites(tiny(arch, dtype=dtype)) == find_sites(tiny(arch))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("arch", ["llama", "phi3", "gpt2"])
def test_weights_do_not_matter(arch: str, value: float) -> None:
    model = tiny(arch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    assert find_sites(model) == find_sites(tiny(arch))


def test_more_layers_than_ten_stay_in_order() -> None:
    assert [s.layer for s in find_sites(tiny("llama", num_hidden_layers=12))] == list(range(12))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients(llama: Any, mode: Any) -> None:
    with mode():
        found = find_sites(llama)
    assert found == find_sites(llama)


def test_offloaded_weights_are_found() -> None:
    from accelerate import cpu_offload

    model = cpu_offload(tiny("llama"), execution_device=torch.device("cpu"))
    assert model.lm_head.weight.device.type == "meta"
    assert find_sites(model) == find_sites(tiny("llama"))


class TestTheModelIsLeftAsItWas:
    def state(self, model: Any) -> list[Any]:
        return [
            [(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()],
            [(n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()],
        ]

    @pytest.mark.parametrize("fails", [False, True])
    @pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
    def test_flags_hooks_weights_and_random_state(self, arch: str, fails: bool) -> None:
        model = tiny(arch)
        model.train()
        first, *_, last = [m for m in model.modules() if not list(m.children())]
        first.eval()
        next(model.parameters()).requires_grad_(False)
        if fails:
            last.register_forward_hook(lambda *args: 1 / 0)
        before, weights = self.state(model), {k: v.clone() for k, v in model.state_dict().items()}
        torch.manual_seed(7)
        random = torch.get_rng_state()
        if fails:
            with pytest.raises(ZeroDivisionError):
                find_sites(model)
        else:
            find_sites(model)
        assert torch.equal(torch.get_rng_state(), random)
        assert self.state(model) == before
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


class TestTrackedLayers:
    @pytest.fixture
    def sites(self, site: FFNSite) -> list[FFNSite]:
        return [replace(site, layer=i, path=f"model.layers.{i}.mlp") for i in range(12)]

    @pytest.mark.parametrize(
        ("patterns", "layers"),
        [
            (["model.layers.*.mlp.up_proj"], range(12)),
            (["model.model.layers.*.mlp.gate_proj"], range(12)),
            (["layers.*.mlp.down_proj"], range(12)),
            (["model.layers.*.mlp"], range(12)),
            (["model.layers.[0-3].mlp.up_proj"], range(4)),
            (["model.layers.[10-99].mlp.up_proj"], [10, 11]),
            (["model.layers.1.mlp.up_proj"], [1]),
            (["layers.1*.mlp.up_proj"], [10, 11]),
            (["layers.[2-2].mlp.up_proj", "model.layers.2.mlp.down_proj", "layers.0.mlp.up_proj"], [0, 2]),
        ],
    )
    def test_patterns(self, sites: list[FFNSite], patterns: list[str], layers: Any) -> None:
        assert [s.layer for s in select_sites(sites, patterns)] == list(layers)

    @pytest.mark.parametrize(
        ("path", "pattern"),
        [
            ("transformer.h.0.mlp", "h.*.mlp.up_proj"),
            ("transformer.h.0.mlp", "model.transformer.h.*.mlp.up_proj"),
            ("model.decoder.layers.0", "model.decoder.layers.*.up_proj"),
            ("model.decoder.layers.0", "layers.*.up_proj"),
            ("gpt_neox.layers.0.mlp", "gpt_neox.layers.*.mlp.up_proj"),
            ("gpt_neox.layers.0.mlp", "model.gpt_neox.layers.*.mlp.up_proj"),
            ("model.language_model.layers.0.mlp", "model.layers.*.mlp.up_proj"),
        ],
    )
    def test_wrapper_prefixes(self, site: FFNSite, path: str, pattern: str) -> None:
        assert len(select_sites([replace(site, path=path)], [pattern])) == 1

    @pytest.mark.parametrize(
        "pattern",
        [
            "model.layers.*.mlp.up",
            "model.layers.*.mlp.up_proj.weight",
            "model.layers.*.self_attn.q_proj",
            "model.layers.12.mlp.up_proj",
            "model.layers.[7-3].mlp.up_proj",
            "model.layers.[12-20].mlp.up_proj",
            "encoder.layers.*.mlp.up_proj",
            "up_proj",
            "mlp.up_proj",
            "modelXlayers.1.mlp.up_proj",
            "",
        ],
    )
    def test_no_match_is_an_error(self, sites: list[FFNSite], pattern: str) -> None:
        with pytest.raises(UsageError) as caught:
            select_sites(sites, ["model.layers.0.mlp.up_proj", pattern])
        assert str(caught.value).startswith(
            f"tracked layer pattern {pattern!r} matches no FFN projection of this model"
        )
        assert "'model.layers.0.mlp.down_proj'" in str(caught.value)

    @pytest.mark.parametrize("part", ["[3]", "[a-b]", "[1-", "[1,2]", "[-3]"])
    def test_a_malformed_range(self, sites: list[FFNSite], part: str) -> None:
        with pytest.raises(UsageError, match=r"is not a range of layers; write '\[a-b\]' with two integers"):
            select_sites(sites, [f"model.layers.{part}.mlp.up_proj"])

    def test_through_find_sites(self, llama: Any) -> None:
        assert [s.layer for s in find_sites(llama, ["model.model.layers.[1-1].mlp.up_proj"])] == [1]


class TestRefusals:
    def test_no_ffn(self) -> None:
        from transformers import AutoModelForCausalLM, MambaConfig

        model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))
        with pytest.raises(
            LayoutError, match=r"no FFN with channels was found in MambaForCausalLM \(model_type 'mamba'"
        ):
            find_sites(model)

    def test_weights_that_layers_share(self, llama: Any) -> None:
        first, second = (layer.mlp for layer in llama.model.layers)
        second.up_proj.weight = first.up_proj.weight
        message = r"model.layers.0.mlp.up_proj and model.layers.1.mlp.up_proj of LlamaForCausalLM share their weights"
        with pytest.raises(LayoutError, match=message):
            find_sites(llama)

    def test_a_layer_that_would_be_left_out(self, llama: Any) -> None:
        mlp = llama.model.layers[1].mlp
        mlp.act_fn = torch.nn.Softmax(-1)  # its channels interact
        with pytest.raises(
            LayoutError, match=r"model.layers.1.mlp.down_proj of LlamaForCausalLM is named like the down"
        ):
            find_sites(llama)

    def test_an_adapter(self, llama: Any) -> None:
        llama.peft_config = {}
        with pytest.raises(ModelError, match=r"carries an adapter \(PEFT\)"):
            find_sites(llama)


def test_tokens_do_not_need_the_whole_vocabulary() -> None:
    assert len(find_sites(tiny("llama", vocab_size=5, pad_token_id=None))) == LAYERS
    assert int(tokens().max()) < 64
