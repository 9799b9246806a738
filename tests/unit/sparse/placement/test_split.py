"""Frequencies, the simulation, and FFNs in two parts, against what the mask gives."""

from __future__ import annotations

import pytest
import torch

from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.errors import NotAvailableError, UnknownNameError, UsageError
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.sparse.kernels.ffn import RowWeights, sparse_ffn
from ffnscope.sparse.placement.frequency import channel_frequencies
from ffnscope.sparse.placement.machine import Machine
from ffnscope.sparse.placement.parts import SplitFFN, split_
from ffnscope.sparse.placement.plan import channel_bytes, plan_placement
from ffnscope.sparse.placement.speed import measure, simulate
from ffnscope.sparse.relu.activation import replace_activation_, set_thresholds_
from ffnscope.sparse.relu.thresholds import NonZero
from ffnscope.sparse.runtime import ACTIVATION_NAMES, unwrap_, wrap_
from ffnscope.sparse.tracing import trace
from ffnscope.testing import check_runtime
from ffnscope.types import FFNWeights
from tiny import tiny, tokens

ARCHS = ("llama", "llama_bias", "gpt2", "phi3", "falcon", "gemma")
MACHINE = Machine(1e6, 1e5, 1e-5, 1e-4)


def relu(arch="llama", tmp_path=None):
    model = tiny(arch)
    sites = replace_activation_(model)
    selectors = {s: NonZero(model, s, 0.1) for s in sites}
    windows = contiguous_windows(tokens(8, 12), "random")
    return model, selectors, None if tmp_path is None else trace(model, windows, tmp_path / "traces")


def test_frequencies_by_hand(tmp_path):
    _, selectors, traces = relu(tmp_path=tmp_path)
    seen = []
    found = channel_frequencies(traces, selectors, on_site=lambda *one: seen.append(one))
    assert seen == [(1, 2), (2, 2)]
    for site, one in found.items():
        assert torch.equal(one, selectors[site](traces.x(site)).double().mean(0))
    fit = channel_frequencies(traces, selectors, "fit")
    site = next(iter(fit))
    assert torch.allclose(fit[site], selectors[site](traces.x(site, "fit")).double().mean(0))
    other = find_sites(tiny("gpt2"))[0]
    with pytest.raises(UnknownNameError, match="Unknown traced site"):
        channel_frequencies(traces, {other: lambda x: x})


def test_simulation_by_hand(tmp_path):
    model, selectors, traces = relu(tmp_path=tmp_path)
    values = channel_frequencies(traces, selectors)
    sizes = {s: channel_bytes(model, s) for s in selectors}
    placement = plan_placement(values, sizes, 6000, MACHINE)
    found = simulate(placement, traces, selectors, "test")
    times = []
    for token in range(len(traces.x(next(iter(selectors)), "test"))):
        total = MACHINE.other_seconds
        for site, selector in selectors.items():
            chosen = selector(traces.x(site, "test")[token : token + 1])[0]
            hot = int((chosen & placement.is_hot(site)).sum()) * sizes[site]
            cold = int(chosen.sum()) * sizes[site] - hot
            total += max(hot / MACHINE.fast, cold / MACHINE.slow) + MACHINE.sync_seconds * (hot > 0 < cold)
        times.append(total)
    assert found.tokens_per_second == pytest.approx(len(times) / sum(times))
    assert (found.kind, found.n_tokens) == ("simulated", len(times))
    placement = plan_placement(values, sizes, 6000, Machine(MACHINE.fast, MACHINE.slow))
    whole = simulate(placement, traces, selectors)
    assert whole.tokens_per_second <= placement.predicted.tokens_per_second * (1 + 1e-9)  # a mean of maxima is longer
    with pytest.raises(UsageError, match="not in this placement"):
        simulate(plan_placement({next(iter(values)): values[next(iter(values))]}, sizes, 0, MACHINE), traces, selectors)


@pytest.mark.parametrize("n_hot", [0, 7, 48])
@pytest.mark.parametrize("arch", ARCHS)
def test_two_parts_are_the_whole(arch, n_hot):
    model = tiny(arch)
    cpu = torch.device("cpu")
    for site in find_sites(model):
        weights, act = weights_of(model, site), ACTIVATION_NAMES[site.activation]
        random = torch.Generator().manual_seed(site.layer)
        hot = torch.randperm(site.d_ff, generator=random)[:n_hot].sort().values
        split = SplitFFN(weights, hot, act, cpu, cpu)
        x = torch.randn(3, site.d_model, generator=random)
        for density in (0.0, 0.3, 1.0):
            mask = torch.rand(3, site.d_ff, generator=random) < density
            index = mask.any(0).nonzero().flatten().int()
            own = mask[:, index]
            expected = sparse_ffn(x, RowWeights.of(weights), index, act, token_mask=own)
            torch.testing.assert_close(split(x, index, own), expected, atol=1e-5, rtol=1e-5)
            whole = sparse_ffn(x, RowWeights.of(weights), index, act)
            torch.testing.assert_close(split(x, index), whole, atol=1e-5, rtol=1e-5)


def test_laws_of_a_runtime():
    cpu = torch.device("cpu")

    def in_two(x, weights, index, act, *, token_mask=None):
        gate = None if weights.gate is None else weights.gate.weight
        biases = (weights.gate_bias, weights.up_bias, weights.down_bias)
        whole = FFNWeights(gate, weights.up.weight, weights.down.weight.T, *biases)
        hot = torch.arange(0, weights.up.weight.shape[0], 3)
        return SplitFFN(whole, hot, act, cpu, cpu)(x, index, token_mask)

    check_runtime(in_two, dtypes=(torch.float32,))


@torch.no_grad()
def decode(model, n_rows=2):
    ids = tokens(n_rows, 9)
    out = model(input_ids=ids[:, :5], use_cache=True)
    found = []
    for i in range(5, 9):
        out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return torch.stack(found)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3"])
def test_a_split_model_is_the_masked_one(arch, tmp_path):
    model, selectors, traces = relu(arch, tmp_path)
    sizes = {s: channel_bytes(model, s) for s in selectors}
    placement = plan_placement(channel_frequencies(traces, selectors), sizes, 5000, MACHINE)
    assert 0 < placement.bytes <= 5000
    wrap_(model, selectors, break_even=0.0)
    expected = decode(model)
    unwrap_(model)
    dense = decode(model)
    with split_(model, placement, selectors, fast="cpu"):
        torch.testing.assert_close(decode(model), expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(NotAvailableError, match="measured on two devices"):
            measure(model, tokens(1, 4), 2)
    assert torch.equal(decode(model), dense) and not torch.allclose(dense, expected, atol=1e-3)
    assert not any("forward" in vars(m) for m in model.modules())


def test_split_refusals(tmp_path):
    model, selectors, traces = relu(tmp_path=tmp_path)
    placement = plan_placement(
        channel_frequencies(traces, selectors), {s: channel_bytes(model, s) for s in selectors}, 0, MACHINE
    )
    first = next(iter(selectors))
    with pytest.raises(UsageError, match="different FFNs"), split_(model, placement, {first: selectors[first]}):
        pass
    set_thresholds_(model, dict.fromkeys(selectors, 0.5))
    with (
        pytest.raises(NotAvailableError, match="remove them, and select with NonZero"),
        split_(model, placement, selectors, fast="cpu"),
    ):
        pass
    model, selectors, traces = relu("opt", tmp_path / "opt")
    values = channel_frequencies(traces, selectors)
    placement = plan_placement(values, {s: channel_bytes(model, s) for s in selectors}, 0, MACHINE)
    with (
        pytest.raises(NotAvailableError, match="no module of its own"),
        split_(model, placement, selectors, fast="cpu"),
    ):
        pass
