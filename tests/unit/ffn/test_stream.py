"""What is found of the residual stream, on every tiny architecture, against what the model computes."""

from __future__ import annotations

import contextlib

import pytest
import torch

from ffnscope.calibrate.collect import calibrate
from ffnscope.ffn.graph import decoder_graph
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.ffn.stream import find_stream
from ffnscope.registry import METRICS
from ffnscope.scoring import score
from offload import KINDS
from reference import padded
from tiny import ARCHITECTURES, HIDDEN, LAYERS, tiny
from tiny_moe import tiny_moe

PARALLEL = ("phi", "gpt_neox", "falcon")
MISSING = {
    "opt_projected": "unembedding: no LM head reads the residual stream",  # a projection stands between
    "bert": "bert.encoder.layer.1: 100% of the change of the stream",  # so does another layer of the head
}


def seen(model, names, ids):
    """Inputs and outputs of modules in one forward."""
    found = {}

    def keep(name):
        def hook(module, args, output):
            found[name] = (args[0].detach().clone(), output.detach().clone())

        return hook

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(keep(name)).remove)
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    return found


def is_attention(reader):
    return reader.site.role == "attention"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_layer_has_its_attention_and_its_place(arch):
    model = tiny(arch)
    stream = find_stream(model, find_sites(model))
    assert len(stream.missing) == (arch in MISSING)
    assert not stream.missing or stream.missing[0].startswith(MISSING[arch])
    assert len(stream.cuts) == len(stream.steps) + 1
    per_step = [[reader.site.role for reader in step] for step in stream.steps]
    expected = [["attention", "ffn"]] * LAYERS if arch in PARALLEL else [["attention"], ["ffn"]] * LAYERS
    assert [sorted(roles) for roles in per_step] == expected
    assert (stream.unembedding is None) == (arch == "opt_projected")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sources_are_the_rows_that_one_token_passes_on(arch):
    model = tiny(arch)
    stream = find_stream(model, find_sites(model))
    for reader in (r for step in stream.steps for r in step if is_attention(r)):
        value, output = reader.site.projections
        found = seen(model, (value, output), torch.tensor([[7]]))
        made, read = found[value][1].flatten(), found[output][0].flatten()
        assert torch.allclose(made[reader.sources], read, atol=1e-6)


def test_heads_that_share_their_values_share_rows():
    model = tiny("llama")
    sources = next(r for step in find_stream(model, find_sites(model)).steps for r in step if is_attention(r)).sources
    assert sources.tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "olmo2"])
def test_weights_of_norms_are_those_that_act(arch):
    model = tiny(arch)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    layer = model.transformer.h[0] if arch == "gpt2" else model.model.layers[0]
    stream = find_stream(model, find_sites(model))
    ffn = next(r for step in stream.steps for r in step if not is_attention(r))
    if arch == "olmo2":
        assert ffn.norm is None
        assert torch.allclose(ffn.out_norm, layer.post_feedforward_layernorm.weight.double(), atol=1e-4)
        return
    before = {"llama": "post_attention_layernorm", "gemma2": "pre_feedforward_layernorm", "gpt2": "ln_2"}[arch]
    offset = 1 if arch == "gemma2" else 0
    assert torch.allclose(ffn.norm, getattr(layer, before).weight.double() + offset, atol=1e-4)
    assert (ffn.out_norm is not None) == (arch == "gemma2")


def test_a_factor_on_the_residual_is_found():
    from transformers import AutoConfig, AutoModelForCausalLM

    row = {**ARCHITECTURES["llama"][1], "residual_multiplier": 0.25}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("granite", **row)).eval()
    stream = find_stream(model, find_sites(model))
    assert [r.gain for step in stream.steps for r in step] == pytest.approx([0.25] * 2 * LAYERS, rel=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_neox", "gpt2"])
def test_cuts_are_the_streams_of_the_model(arch):
    model, windows = tiny(arch), padded([16, 9, 5])
    stats = calibrate(model, windows, ["graph_backward"])
    stream = find_stream(model, find_sites(model))
    mask = windows.valid
    with torch.no_grad():
        hidden = model(windows.input_ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    per_layer = len(stream.steps) // LAYERS
    for layer in range(LAYERS):
        energy = hidden[layer][mask].double().square().mean(0)
        assert torch.allclose(stats[stream.cuts[layer * per_layer]].mean("stream_sq"), energy, rtol=1e-5)
    last = hidden[-1][mask].double().square().mean(0)  # after the last norm
    assert torch.allclose(stats[stream.unembedding].mean("stream_sq"), last, rtol=1e-5)


def test_an_attention_that_is_not_recognised_is_named_and_skipped():
    model = tiny("llama")
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    stream = find_stream(model, find_sites(model))
    assert [len(s) for s in stream.steps] == [1, 1, 1]
    assert any("model.layers.1: no attention was found" in text for text in stream.missing)
    with pytest.warns(UserWarning, match=r"graph_backward does not see all of the model: model\.layers\.1"):
        found = score(model, find_sites(model), "graph_backward", strength="weight")
    assert found.facts["not_in_graph"] == list(stream.missing)


def test_the_model_is_left_as_it_was():
    model = tiny("llama").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    find_stream(model, find_sites(model))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_weights_are_read_one_at_a_time(kind, tmp_path):
    model, resident = KINDS[kind]("llama", tmp_path), tiny("llama")
    sites = find_sites(resident)
    graph, wanted = decoder_graph(model, sites), decoder_graph(resident, sites)
    for found, expected in zip(graph.branches, wanted.branches, strict=True):
        for a, b in zip((*found.readers, found.down), (*expected.readers, expected.down), strict=True):
            with a.read() as one, b.read() as other:
                assert torch.equal(one, other)
    assert {p.device.type for p in model.parameters()} >= {"meta"}


@pytest.mark.parametrize("arch", ["llama", "phi3", "gpt2"])
def test_matrices_are_those_of_the_site(arch):
    model = tiny(arch)
    for branch in decoder_graph(model, find_sites(model)).ffns:
        weights = weights_of(model, branch.site)
        found = [branch.up, branch.down, *([branch.gate] if branch.gate else [])]
        for matrix, expected in zip(found, (weights.up, weights.down, weights.gate), strict=False):
            with matrix.read() as weight:
                assert torch.equal(weight, expected)


def test_experts_are_one_step():
    model = tiny_moe("mixtral")
    sites = find_sites(model)
    graph = decoder_graph(model, sites)
    assert graph.missing == ()
    assert [len(step) for step in graph.steps] == [1, len(sites) // 2] * 2
    stats = calibrate(model, padded([16, 9, 5]), ["graph_backward"])
    assert graph.d_model == HIDDEN or graph.d_model == sites[0].d_model
    found = score(model, stats, "graph_backward")
    assert found.sites == tuple(sites)


@pytest.mark.parametrize("name", [n for n in METRICS.names() if METRICS.get(n).scope == "model"])
def test_every_model_metric_scores_a_model(name):
    model = tiny("llama")
    stats = calibrate(model, padded([16, 9, 5]), [name])
    assert score(model, stats, name).sites == tuple(find_sites(model))
