"""What a pass is announced to take, against what its tensors do take."""

from __future__ import annotations

import pytest
import torch

from allocations import peak_bytes
from ffnscope.calibrate.collect import PassOptions, collect, required_statistics
from ffnscope.calibrate.forward import experts_per_token, forward_logits
from ffnscope.calibrate.memory import pass_bytes, statistics_bytes
from ffnscope.calibrate.observe import sum_nll
from ffnscope.calibrate.taps import channel_taps
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.sites import find_sites
from ffnscope.registry import STATISTICS
from ffnscope.rules import Statistic
from ffnscope.types import FFNSite
from reference import text
from tiny import tiny
from tiny_moe import EXPERT, TOP_K, tiny_moe

WIDE = {"vocab_size": 2000, "max_position_embeddings": 128}
LAYERS = {"llama": {"num_hidden_layers": 5, "intermediate_size": 160}, "gpt2": {"n_layer": 5, "n_inner": 160}}
SUMS, GRADIENTS, MOMENTS = ["act_sq", "act_hist"], ["act_sum", "taylor_sq", "grad_sq"], ["h_outer", "xh_outer"]
SITE = FFNSite(0, "layers.0.mlp", None, "up", "down", 4, 10)


def bare(model, sites, windows, size, backward):
    with frozen(model):
        for batch in windows.batches(size):
            if not backward:
                with torch.inference_mode():
                    forward_logits(model, batch)
                continue
            with torch.enable_grad(), channel_taps(model, sites[:1], None, lambda *_: None):
                sum_nll(forward_logits(model, batch), batch).backward()


def growth(model, sites, names, core=None):
    """Bytes of the pass beyond the bare one, over two batches of 4 windows of 64 tokens."""
    windows = text(8, 64)
    backward = any(STATISTICS.get(n).needs_gradient for n in names)
    base = peak_bytes(lambda: bare(model, sites, windows, 4, backward))
    options = PassOptions(batch_size=4)
    return peak_bytes(lambda: collect(model, windows, names, sites=sites, core=core, options=options)) - base


def near(announced, measured):
    return abs(announced - measured) < 0.03 * measured + 8192  # indices and masks of a batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", [SUMS, GRADIENTS, MOMENTS, [*SUMS, *GRADIENTS, *MOMENTS]], ids="-".join)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_pass_grows_by_what_was_announced(arch, names, dtype):
    model = tiny(arch, dtype=dtype, **WIDE, **LAYERS[arch])
    sites = find_sites(model)
    n_tokens = 256 if names not in (SUMS, MOMENTS) else 0
    assert near(pass_bytes(sites, names, n_tokens, dtype), growth(model, sites, names))


def test_every_channel_as_core():
    model = tiny("llama", **WIDE, **LAYERS["llama"])
    sites = find_sites(model)
    names = required_statistics(["supernode_protection_score"])
    core = {site: torch.arange(site.d_ff) for site in sites}
    announced = pass_bytes(sites, names, 256, torch.float32, None)
    assert announced > 5 * 8 * 160 * 160
    assert near(announced, growth(model, sites, names, core))


def test_the_activation_behind_relu_is_not_held_twice():
    model = tiny("opt", **WIDE, num_hidden_layers=5, ffn_dim=160)
    sites = find_sites(model)
    announced = pass_bytes(sites, GRADIENTS, 256, torch.float32)
    assert announced == statistics_bytes(sites, GRADIENTS)
    assert near(announced, growth(model, sites, GRADIENTS))


def test_signals_that_wait_for_the_backward(monkeypatch):
    """y is a copy, as some models add to it in place; x is kept by nothing else."""
    item = Statistic("xyg", lambda x, y, g: x.sum(0) + y.sum(0) + g.sum(), ("x", "y", "g"), "sum", ("d_model",), 1, "")
    monkeypatch.setitem(STATISTICS._items, "xyg", item)
    model = tiny("llama", **WIDE, **LAYERS["llama"])
    sites = find_sites(model)
    held = (5 * 2 * 32 + 4 * 160) * 4 * 256  # x and y of 5 sites, h of all but the first
    announced = pass_bytes(sites, ["xyg"], 256, torch.float32)
    assert announced == held + 5 * 8 * 32
    assert near(announced, growth(model, sites, ["xyg"]))


def test_experts_hold_the_tokens_that_are_routed_to_them():
    model = tiny_moe("mixtral", **WIDE, num_hidden_layers=5)
    sites = find_sites(model)
    announced = pass_bytes(sites, GRADIENTS, 256, torch.float32, experts_per_token=experts_per_token(model))
    assert announced == statistics_bytes(sites, GRADIENTS) + 4 * 256 * TOP_K * EXPERT * 4
    copies = 3 * 256 * EXPERT * 4  # of h, g and their product for one expert's tokens, at most all
    assert 0 <= growth(model, sites, GRADIENTS) - announced < copies + 2**16  # and indices of the routed tokens


def test_bytes_of_statistics():
    names = ["act_sq", "act_hist", "x_outer", "h_outer", "taylor_core"]
    vectors = 8 * 10 + 4 * 128 * 10 + 8 * 4 * 4 + 8 * 10 * 10
    assert statistics_bytes([SITE], names, 3) == vectors + 8 * 3 * 10
    assert statistics_bytes([SITE], names, None) == vectors + 8 * 10 * 10
    assert statistics_bytes([SITE, SITE], iter(names), 3) == 2 * (vectors + 8 * 3 * 10)
    assert pass_bytes([SITE], names[:4], 10**6, torch.float32) == statistics_bytes([SITE], names[:4])  # nothing waits


def test_temporaries_of_second_moments_are_blocks():
    """The product of a batch would be half as large again as its float64 sum, and its float64 copy as large."""
    d_ff = 1024
    h, total = torch.randn(64, d_ff), torch.zeros(d_ff, d_ff, dtype=torch.float64)
    assert peak_bytes(lambda: STATISTICS.get("h_outer").fn(total, h)) < 0.5 * total.nbytes
    assert torch.allclose(total, h.double().T @ h.double(), rtol=0, atol=1e-3)
    assert torch.equal(total, total.T)
