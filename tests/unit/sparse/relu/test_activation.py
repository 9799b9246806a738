"""Another activation: in every module and in the config, or not at all."""

from __future__ import annotations

import pytest
import torch

from ffnscope.errors import NotAvailableError, UnknownNameError, UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.sparse.relu.activation import FATReLU, places, replace_activation_, set_thresholds_
from tiny import ARCHITECTURES, logits, tiny, tokens
from tiny_all import tiny_causal_lm
from tiny_moe import tiny_moe

FIXED = ("bloom", "bert")  # in the code; by the same field as the activation of the language model head
OTHER = [name for name in ARCHITECTURES if name not in FIXED]


def rebuilt(model):
    """What transformers builds from config and weights."""
    fresh = type(model)(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    return fresh


@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("arch", OTHER)
def test_replaced_as_transformers_builds_it(arch, activation):
    model = tiny(arch)
    before, same = logits(model), model.config.get_text_config().to_dict()
    sites = replace_activation_(model, activation)
    assert {site.activation for site in sites} == {activation}
    changed = [k for k, v in model.config.get_text_config().to_dict().items() if v != same.get(k)]
    kept = arch in ("llama_relu", "opt", "opt_projected") and activation == "relu"
    assert len(changed) == (0 if kept else 1)
    assert torch.equal(logits(model), before) == kept
    assert torch.equal(logits(rebuilt(model)), logits(model))


def test_twice_is_once():
    model = tiny("llama")
    first = replace_activation_(model)
    found = logits(model)
    assert replace_activation_(model) == first
    assert torch.equal(logits(model), found)


@pytest.mark.parametrize("arch", FIXED)
def test_what_is_fixed_in_code_is_refused(arch):
    model = tiny(arch)
    before = logits(model)
    with pytest.raises(NotAvailableError, match=r"(fixed in its code|TransformHead|transform_act_fn)"):
        replace_activation_(model)
    assert torch.equal(logits(model), before)


def test_a_field_that_the_code_does_not_read_is_refused(llama):
    """A module that the config does not build: the checkpoint would compute something else."""
    before = llama.config.hidden_act

    class Fixed(type(llama)):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp.act_fn = torch.nn.SiLU()

    llama.__class__ = Fixed
    kind = type(llama.model.layers[0].mlp.act_fn)
    with pytest.raises(NotAvailableError, match=r"SiLU at model\.layers\.0\.mlp\.act_fn, where this model has ReLU"):
        replace_activation_(llama)
    assert llama.config.hidden_act == before
    assert type(llama.model.layers[1].mlp.act_fn) is kind


def test_experts_and_names_are_refused(llama):
    with pytest.raises(NotAvailableError, match="is an expert"):
        replace_activation_(tiny_moe("mixtral"))
    with pytest.raises(UnknownNameError, match="Did you mean 'relu'"):
        replace_activation_(llama, "rellu")


def test_codebooks_are_refused():
    with pytest.raises(NotAvailableError, match="several codebooks"):
        replace_activation_(tiny_causal_lm("musicgen"))


class TestFATReLU:
    def test_values(self):
        x = torch.tensor([-2.0, 0.0, 0.3, 0.5, 2.0, float("nan")])
        found = FATReLU(0.5, torch.nn.ReLU())(x)
        assert found[:5].tolist() == [0, 0, 0, 0.5, 2] and found[5].isnan()
        assert FATReLU(0.5, torch.nn.ReLU())(x.bfloat16()).dtype == torch.bfloat16

    def test_gradient_only_where_kept(self):
        x = torch.tensor([-1.0, 0.2, 0.7], requires_grad=True)
        FATReLU(0.5, torch.nn.ReLU())(x).sum().backward()
        assert x.grad.tolist() == [0, 0, 1]

    @pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
    def test_impossible_thresholds(self, value, llama):
        sites = replace_activation_(llama)
        with pytest.raises(UsageError, match="must be 0 or more, and finite"):
            set_thresholds_(llama, {sites[0]: 0.1, sites[1]: value})
        assert not any(type(p.held) is FATReLU for site in sites for p in places(llama, site))

    def test_put_in_and_back(self, llama):
        with pytest.raises(NotAvailableError, match="has the activation 'silu'"):
            set_thresholds_(llama, {find_sites(llama)[0]: 0.1})
        sites = replace_activation_(llama)
        plain = logits(llama, tokens())
        set_thresholds_(llama, dict.fromkeys(sites, 0.2))
        shifted = logits(llama, tokens())
        assert not torch.allclose(shifted, plain, atol=1e-3)
        set_thresholds_(llama, {sites[0]: 0.3})
        assert [places(llama, s)[0].held.threshold for s in sites] == [0.3, 0.2]
        assert find_sites(llama) == sites  # still found, with the activation of the config
        set_thresholds_(llama, dict.fromkeys(sites, 0.0))
        assert torch.equal(logits(llama, tokens()), plain)
