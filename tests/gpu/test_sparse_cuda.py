"""Kernels for gathered rows, the wrapped model and the split one on CUDA give what torch and the mask give."""

from __future__ import annotations

import pytest
import torch

from checkpoints import make_checkpoint
from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.ffn.load import load_model
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.sparse.kernels.ffn import IN_TORCH, RowWeights, sparse_ffn
from ffnscope.sparse.kernels.rows import has_triton
from ffnscope.sparse.placement.frequency import channel_frequencies
from ffnscope.sparse.placement.machine import Machine, probe_bandwidth
from ffnscope.sparse.placement.parts import split_
from ffnscope.sparse.placement.plan import channel_bytes, plan_placement
from ffnscope.sparse.placement.speed import measure
from ffnscope.sparse.relu.activation import replace_activation_
from ffnscope.sparse.relu.convert import relufy_
from ffnscope.sparse.relu.thresholds import NonZero
from ffnscope.sparse.relu.training import ReluOptions
from ffnscope.sparse.runtime import unwrap_, wrap_
from ffnscope.sparse.tracing import trace
from tiny import tiny, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.skipif(not has_triton(), reason="no triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["llama", "llama_bias", "phi3", "gpt2"])
def test_kernels(arch, dtype):
    model = tiny(arch, dtype=dtype).cuda()
    for site in find_sites(model):
        weights = weights_of(model, site)
        rows, plain = RowWeights.of(weights), RowWeights.of(weights, compiled=False)
        assert rows.up.compiled and not plain.up.compiled
        x = torch.randn(2, site.d_model, device="cuda", dtype=dtype)
        for act in IN_TORCH:
            for k in (0, 1, 20, site.d_ff):
                index = torch.randperm(site.d_ff)[:k].sort().values.int().cuda()
                mask = torch.rand(2, k, device="cuda") < 0.5
                for own in (None, mask):
                    found = sparse_ffn(x, rows, index, act, token_mask=own)
                    expected = sparse_ffn(x, plain, index, act, token_mask=own)
                    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
                    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def decode(model):
    ids = tokens(1, 9).cuda()
    out = model(input_ids=ids[:, :5], use_cache=True)
    found = []
    for i in range(5, 9):
        out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits.cpu())
    return torch.stack(found)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_wrapped_and_split(arch, tmp_path):
    model = tiny(arch)
    sites = replace_activation_(model)
    selectors = {s: NonZero(model, s, 0.1) for s in sites}
    traces = trace(model, contiguous_windows(tokens(8, 12), "random"), tmp_path / "traces")
    machine = Machine(probe_bandwidth("cuda", 2**26), probe_bandwidth("cpu", 2**26))
    sizes = {s: channel_bytes(model, s) for s in sites}
    placement = plan_placement(channel_frequencies(traces, selectors), sizes, 5000, machine)
    with split_(model, placement, selectors):
        found = decode(model)
        assert measure(model, tokens(1, 4), 4).kind == "measured"
    model.cuda()
    on_cuda = {s: NonZero(model, s, 0.1) for s in sites}
    wrap_(model, on_cuda, break_even=0.0)
    expected = decode(model)
    unwrap_(model)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    wrap_(model, on_cuda, break_even=1.0)
    torch.testing.assert_close(decode(model), expected, atol=1e-4, rtol=1e-4)
    unwrap_(model)


def test_training(tmp_path):
    loaded = load_model(str(make_checkpoint(tmp_path / "llama")))
    loaded.model.cuda()
    text, held_out = (contiguous_windows(tokens(n, 16, seed=n), "random") for n in (24, 4))
    options = ReluOptions(steps=4, learning_rate=1e-3, measure_every=2, rise=None)
    if torch.cuda.device_count() > 1:
        pytest.skip("several devices are refused")
    result = relufy_(loaded, text, held_out, tmp_path / "out", options=options)
    assert result.rows[-1]["sparsity"] > 0.3
