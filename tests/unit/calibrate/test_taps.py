"""Taps see the channels, and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from ffnscope.calibrate.observe import observe_batch, sum_nll
from ffnscope.calibrate.taps import channel_taps
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.sites import find_sites
from reference import exact, text
from tiny import tiny, tokens


def hooks_of(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks)
        for m in model.modules()
    )


def collect(model, sites, windows, gradients=False):
    h, g = {}, {}

    def on_activation(site, values):
        h[site] = values.clone()

    def on_gradient(site, values, grad):
        assert torch.equal(values, h[site])
        g[site] = grad.clone()

    with frozen(model):
        observe_batch(model, sites, windows, on_activation, on_gradient if gradients else None)
    return h, g


def test_h_is_what_the_down_projection_reads():
    model = tiny("llama")
    site = find_sites(model)[0]
    inputs = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    h, _ = collect(model, [site], text(2))
    handle.remove()
    ffn, x = model.model.layers[0].mlp, inputs[0].clone()
    assert torch.allclose(h[site], silu(ffn.gate_proj(x)) * ffn.up_proj(x), atol=1e-6)


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt_neox", "phi3"])
def test_g_is_the_derivative_of_the_summed_loss(arch):
    """Against a finite difference: every channel of one site is scaled by 1 + step, token by token at once."""
    model = exact(arch)
    windows = text(2)
    site = find_sites(model)[0]
    h, g = collect(model, [site], windows, gradients=True)
    down = model.get_submodule(site.projections[-1])
    for channel in (0, 7, 47):
        losses = []
        for step in (1e-5, -1e-5):

            def scale(module, args, step=step):
                x = args[0].clone()
                x[..., channel] *= 1 + step  # noqa: B023
                return (x,)

            handle = down.register_forward_pre_hook(scale)
            with torch.no_grad():
                losses.append(float(sum_nll(model(input_ids=windows.input_ids, use_cache=False).logits, windows)))
            handle.remove()
        slope = (losses[0] - losses[1]) / 2e-5
        assert float((h[site] * g[site])[..., channel].sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_values_are_detached_views_of_the_model():
    model = tiny("llama")
    h, g = collect(model, find_sites(model), text(1), gradients=True)
    assert not any(t.requires_grad for t in (*h.values(), *g.values()))


def test_tapping_does_not_change_the_forward():
    model = tiny("gpt_neox")
    ids = tokens(2, 16)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    with channel_taps(model, find_sites(model), lambda s, h: None, lambda s, h, g: None):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


def test_the_graph_starts_at_the_first_tapped_site():
    model = tiny("llama")
    first, second = find_sites(model)
    grown = {}

    def note(name):
        return lambda module, args, output: grown.__setitem__(name, output.requires_grad)

    layers = model.model.layers
    handles = [
        layers[0].mlp.down_proj.register_forward_hook(note("down 0")),
        layers[1].mlp.up_proj.register_forward_hook(note("up 1")),
        layers[1].mlp.down_proj.register_forward_hook(note("down 1")),
    ]
    collect(model, [second], text(1), gradients=True)
    assert grown == {"down 0": False, "up 1": False, "down 1": True}
    collect(model, [first], text(1), gradients=True)
    assert grown == {"down 0": True, "up 1": True, "down 1": True}
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox"])
def test_no_weight_gradient_is_made(arch):
    model = tiny(arch)
    made = []
    handles = [p.register_hook(lambda g: made.append(g.shape)) for p in model.parameters()]
    wanted = []

    def on_gradient(site, h, g):
        wanted.append([p for p in model.parameters() if p.requires_grad])

    with frozen(model):
        observe_batch(model, find_sites(model), text(2), None, on_gradient)
    assert made == []
    assert wanted == [[], []]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for handle in handles:
        handle.remove()


def test_forward_only_runs_in_inference_mode():
    model = tiny("llama")
    modes = []
    with frozen(model):
        observe_batch(model, find_sites(model), text(1), lambda s, h: modes.append(torch.is_inference_mode_enabled()))
    assert modes == [True, True]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_also_where_the_caller_switched_them_off(mode):
    model = exact("llama")
    sites = find_sites(model)
    _, expected = collect(model, sites, text(2), gradients=True)
    windows = text(2)
    with mode():
        _, found = collect(model, sites, windows, gradients=True)
    assert all(torch.equal(found[s], expected[s]) for s in sites)


@pytest.mark.parametrize("where", ["forward", "backward", "model"])
def test_hooks_are_removed_after_an_exception(where):
    model = tiny("llama")
    sites = find_sites(model)
    before = hooks_of(model)

    def fail(*signals):
        raise RuntimeError("stop here")

    def ignore(*signals):
        pass

    on_activation = fail if where == "forward" else ignore
    on_gradient = fail if where == "backward" else ignore
    handle = model.lm_head.register_forward_pre_hook(fail) if where == "model" else None
    with pytest.raises(RuntimeError, match="stop here"), frozen(model):
        observe_batch(model, sites, text(2), on_activation, on_gradient)
    if handle:
        handle.remove()
    assert hooks_of(model) == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_hooks_are_removed_when_a_site_is_missing():
    model, other = tiny("llama"), tiny("gpt2")
    sites = [*find_sites(model), *find_sites(other)]
    with pytest.raises(ValueError, match="not in this model"), channel_taps(model, sites, lambda s, h: None):
        pass
    assert hooks_of(model) == 0


def test_frozen_gives_every_module_and_weight_its_own_state_back():
    model = tiny("llama").train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt), frozen(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyboardInterrupt
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags


def test_gradients_that_the_user_keeps_stay():
    model = tiny("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight)
    collect(model, find_sites(model), text(1), gradients=True)
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_dropout_does_not_run():
    model = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    assert any(isinstance(m, nn.Dropout) and m.p == 0.5 for m in model.modules())
    first, second = (collect(model, find_sites(model), text(2))[0] for _ in range(2))
    assert all(torch.equal(first[s], second[s]) for s in first)
    assert model.training
