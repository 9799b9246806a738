"""What a survey tells: sites, refusals and helpers, each by name and reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ffnscope.ffn.survey import LeftOut, describe, nothing_found, survey
from tiny import tiny
from tiny_all import tiny_causal_lm
from tiny_listed import tiny_listed
from tiny_moe import N_EXPERTS


def refusals(model: Any) -> dict[str, str]:
    return {one.path: one.reason for one in survey(model).refused}


def test_a_plain_model() -> None:
    found = survey(tiny("llama"))
    assert (found.model_class, found.model_type) == ("LlamaForCausalLM", "llama")
    assert [s.path for s in found.sites] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert (found.refused, found.helpers) == ((), ())


def test_channels_that_depend_on_each_other() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.act_fn = torch.nn.Softmax(-1)
    reason = "its channels do not each depend on one output of gate and up alone, so none can be removed by itself"
    assert refusals(model) == {"model.layers.1.mlp.down_proj": reason}
    assert [s.layer for s in survey(model).sites] == [0]


def with_inner_norm(kind: Any, *layers: int) -> Any:
    model = tiny_causal_lm("bitnet")
    for layer in layers:
        mlp = model.model.layers[layer].mlp
        mlp.ffn_sub_norm = kind(mlp.intermediate_size)
    return model


class ShiftedNorm(torch.nn.Module):
    """An RMS norm whose weight is stored without its 1."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def test_an_inner_norm_is_part_of_the_site() -> None:
    assert [s.norm for s in survey(tiny_causal_lm("bitnet")).sites] == ["ffn_sub_norm"] * 3
    found = survey(with_inner_norm(torch.nn.RMSNorm, 0, 1, 2))
    assert ([s.norm for s in found.sites], found.refused) == (["ffn_sub_norm"] * 3, ())


@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, ShiftedNorm])
def test_an_inner_norm_that_cannot_be_narrowed_is_named(kind: Any) -> None:
    model = with_inner_norm(kind, 2)
    assert [s.layer for s in survey(model).sites] == [0, 1]
    reason = refusals(model)["model.layers.2.mlp.down_proj"]
    assert "a norm over all its channels (model.layers.2.mlp.ffn_sub_norm)" in reason


def test_an_inner_norm_without_a_gate_is_refused() -> None:
    model = tiny_causal_lm("bitnet")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.ffn_sub_norm(torch.sigmoid(mlp.up_proj(x))))
    assert list(refusals(model)) == ["model.layers.1.mlp.down_proj"]


def test_sparse_activations_of_some_layers() -> None:
    model = tiny_causal_lm("gemma3n_text")
    assert [s.layer for s in survey(model).sites] == [2, 3]
    assert list(refusals(model)) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def test_a_layer_that_takes_no_part() -> None:
    model = tiny_causal_lm("mllama, cross attention")
    assert [s.layer for s in survey(model).sites] == [0, 2]
    reason = "it is named like the down projection of other layers, but takes no part in reading a text"
    assert refusals(model) == {"model.layers.1.mlp.down_proj": reason}


def test_weights_that_layers_share() -> None:
    model = tiny("llama", num_hidden_layers=3)
    first, second, _ = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    assert refusals(model) == {
        "model.layers.0.mlp.down_proj": "it shares its weights with model.layers.1.mlp.down_proj",
        "model.layers.1.mlp.down_proj": "it shares its weights with model.layers.0.mlp.down_proj",
    }
    assert [s.layer for s in survey(model).sites] == [2]


def test_experts_of_a_list_that_share_weights_are_refused() -> None:
    model = tiny_listed()
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second[1].w3.weight = first[2].w3.weight
    one, other = "model.layers.0.mlp.experts.2", "model.layers.1.mlp.experts.1"
    assert refusals(model) == {
        f"{one}.w2": f"it shares its weights with {other}.w2",
        f"{other}.w2": f"it shares its weights with {one}.w2",
    }
    assert len(survey(model).sites) == 2 * N_EXPERTS - 2


def test_a_block_that_layers_share_is_one_site() -> None:
    (site,) = survey(tiny_causal_lm("zamba")).sites
    paths = [f"model.layers.{i}.shared_transf.feed_forward" for i in (2, 4)]
    assert (site.layer, site.path, site.twins, site.adapters) == (2, paths[0], (paths[1],), ())


def test_adapters_of_shared_blocks() -> None:
    found = survey(tiny_causal_lm("zamba2, two blocks"))
    assert found.refused == ()
    assert [(s.layer, s.twins, s.adapters) for s in found.sites] == [
        (
            i + 1,
            (f"model.layers.{i + 4}.shared_transformer.feed_forward",),
            (f"gate_up_proj_adapter_list.{i}.1", f"gate_up_proj_adapter_list.{i + 2}.1"),
        )
        for i in (0, 1)
    ]


def test_a_shared_block_with_adapters_of_its_own_is_refused() -> None:
    model = tiny_causal_lm("zamba2")
    (site,) = survey(model).sites
    module = model.get_submodule(f"{site.path}.gate_up_proj_adapter_list.0.1")
    module.weight = torch.nn.Parameter(module.weight.detach().clone())
    reasons = refusals(model)
    assert len(reasons) == 2
    assert all(reason.startswith("it shares its weights with model.layers.") for reason in reasons.values())


@pytest.mark.parametrize(
    ("name", "sites", "helper"),
    [
        ("xmod", 3, "roberta.encoder.layer.0.output.adapter_modules.en_XX.dense2"),
        ("blt", 9, "model.patcher.layers.0.mlp.down_proj"),
        ("axk2", 3, "model.layers.0.input_layernorm.mlp.fc2"),
        ("qwen4_exp_text", 3, "model.layers.0.attn_hyper_connection.input_mix_weight_up"),
    ],
)
def test_helper_networks_are_no_sites(name: str, sites: int, helper: str) -> None:
    found = survey(tiny_causal_lm(name))
    assert helper in [one.path for one in found.helpers]
    assert sum(s.expert is None for s in found.sites) == sites


def test_a_prefix_named_like_a_helper() -> None:
    assert len(survey(tiny_causal_lm("roberta-prelayernorm")).sites) == 3


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_mamba"])
def test_an_architecture_without_ffn(name: str) -> None:
    model = tiny_causal_lm(name)
    found = survey(model)
    assert not found.sites + found.refused
    assert "its layers are state-space mixers, whose input projection feeds a convolution" in str(
        nothing_found(model, found)
    )


def test_an_unknown_architecture_names_its_layers() -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp = torch.nn.Identity()
    text = str(nothing_found(model, survey(model)))
    assert text.startswith("no FFN with channels was found in LlamaForCausalLM (model_type 'llama')")
    assert "(LlamaDecoderLayer, LlamaAttention)" in text
    assert text.endswith("Please report the architecture.")


def test_nothing_but_refusals() -> None:
    model = with_inner_norm(torch.nn.LayerNorm, 0, 1, 2)
    text = str(nothing_found(model, survey(model)))
    assert text.startswith("none of the FFNs of BitNetForCausalLM (model_type 'bitnet') can be cut. model.layers.*")


def test_a_model_of_several_codebooks() -> None:
    assert len(survey(tiny_causal_lm("musicgen")).sites) == 3


def test_layers_are_drawn_together() -> None:
    rows = [LeftOut(f"layers.{i}.down", f"like layers.{i}.norm") for i in range(12)]
    assert describe([*rows, LeftOut("head.1", "no")]) == ("layers.*.down (12 times): like layers.*.norm; head.*: no")


def test_retrieval_experts_are_told_beside_the_ffn_that_is_found() -> None:
    model = tiny_causal_lm("doge, retrieval experts")
    assert [s.path for s in survey(model).sites] == [f"model.layers.{i}.mlp" for i in range(3)]
    found = refusals(model)
    assert list(found) == [f"model.layers.{i}.mlp.up_embed" for i in range(3)]
    assert all(why.startswith("its experts are single channels in the rows of embeddings") for why in found.values())
