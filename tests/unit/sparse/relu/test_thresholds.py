"""Thresholds: their error by brute force, the bound, and the runtime that reads only what is not zero."""

from __future__ import annotations

import pytest
import torch

from faults import flip_digit
from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.errors import ArtifactError, UsageError
from ffnscope.evaluate.perplexity import perplexity
from ffnscope.ffn.sites import find_sites
from ffnscope.sparse.ffn import ffn_of
from ffnscope.sparse.kernels.rows import RowMatrix
from ffnscope.sparse.relu.activation import FATReLU, replace_activation_, set_thresholds_
from ffnscope.sparse.relu.measure import measure_zeros
from ffnscope.sparse.relu.thresholds import (
    NonZero,
    calibrate_thresholds,
    error_curves,
    read_thresholds,
    write_thresholds,
)
from ffnscope.sparse.runtime import unwrap_, wrap_
from ffnscope.sparse.streaming import trace_rounds
from tiny import tiny, tokens

ARCHS = ("llama", "opt", "gpt2", "phi3")


def relu_model(arch, activation="relu"):
    model = tiny(arch)
    return model, replace_activation_(model, activation), contiguous_windows(tokens(6, 12), "random")


@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("arch", ARCHS)
def test_errors_by_brute_force(arch, activation):
    model, sites, windows = relu_model(arch, activation)
    curves = error_curves(model, windows, sites)
    traced = {s: one.x for found in trace_rounds(model, sites, [windows]) for s, one in found.items()}
    for site, curve in curves.items():
        ffn, x = ffn_of(model, site), traced[site]
        down = ffn.weights.down.T
        whole = ffn.h(x) @ down
        for threshold, error in zip(curve.thresholds[1::5].tolist(), curve.errors[1::5].tolist(), strict=True):
            act = FATReLU(threshold, ffn.act)
            weight, bias = ffn.activated_weight
            h = act(torch.nn.functional.linear(x, weight, bias)) * (ffn.up(x) if ffn.gated else 1)
            assert float((h @ down - whole).norm() / whole.norm()) == pytest.approx(error, rel=1e-4, abs=1e-6)
        assert curve.thresholds[0] == curve.errors[0] == 0
        assert bool((curve.thresholds.diff() > 0).all()) and bool((curve.errors.diff() >= 0).all())
        assert curve.largest(0.0) == curve.thresholds[int((curve.errors == 0).sum()) - 1]
        assert curve.largest(float("inf")) == curve.thresholds[-1]


@pytest.mark.parametrize("rise", [0.0, 0.001, 0.05, 1e6])
def test_the_bound_holds(rise):
    model, sites, windows = relu_model("llama")
    dense, seen = perplexity(model, windows).value, []
    found = calibrate_thresholds(model, windows, sites, rise=rise, on_trial=lambda *one: seen.append(one))
    assert perplexity(model, windows).value == dense == pytest.approx(found.before)  # no threshold stays
    set_thresholds_(model, found.thresholds)
    after = perplexity(model, windows).value
    assert after == pytest.approx(found.after, rel=1e-6) and after <= dense * (1 + rise) * (1 + 1e-9)
    assert seen == [(i, 12) for i in range(1, 13)]
    if rise == 1e6:  # nothing holds it back
        curves = error_curves(relu_model("llama")[0], windows, sites)
        assert list(found.thresholds.values()) == [curve.thresholds[-1] for curve in curves.values()]


def test_impossible_bound():
    model, sites, windows = relu_model("llama")
    with pytest.raises(UsageError, match="must be 0 or more"):
        calibrate_thresholds(model, windows, sites, rise=-0.1)


@pytest.mark.parametrize("threshold", [0.0, 0.25])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_the_runtime_loses_nothing(arch, activation, threshold):
    """Zeros are really zero: decoding without reading them gives the same logits."""
    model, sites, windows = relu_model(arch, activation)
    set_thresholds_(model, dict.fromkeys(sites, threshold))
    zeros = measure_zeros(model, windows, sites).sparsity
    ids = tokens(1, 9)

    def decode():
        out = model(input_ids=ids[:, :5], use_cache=True)
        found = []
        for i in range(5, 9):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
        return torch.stack(found)

    dense = decode()
    runtime = wrap_(model, {s: NonZero(model, s, threshold) for s in sites}, break_even=1.0)
    found = decode()
    measured = runtime.measured()
    unwrap_(model)
    torch.testing.assert_close(found, dense, atol=1e-5, rtol=1e-5)
    assert all(row.sparse_steps == 1 for row in measured.values())
    set_thresholds_(model, dict.fromkeys(sites, 0.0))  # the selection has them
    plain = wrap_(model, {s: NonZero(model, s, threshold) for s in sites}, prefill=True, break_even=1.0)
    torch.testing.assert_close(decode(), dense, atol=1e-5, rtol=1e-5)
    assert set(plain.levels.values()) == {"projections" if arch == "opt" else "module"}
    unwrap_(model)
    density = sum(row.density for row in measured.values()) / len(sites)
    assert density < 0.7 and density == pytest.approx(1 - zeros, abs=0.15)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_the_runtime_does_not_read_the_gate_again(arch, rows, monkeypatch):
    """Of a gated FFN rows of up are read, of a plain one none."""
    model, sites, _ = relu_model(arch)
    ids, seen, dot = tokens(rows, 1), [], RowMatrix.dot
    expected = model(input_ids=ids).logits
    runtime = wrap_(model, {s: NonZero(model, s) for s in sites}, break_even=1.0)
    monkeypatch.setattr(RowMatrix, "dot", lambda self, *args: seen.append(self) or dot(self, *args))
    monkeypatch.setattr("ffnscope.sparse.kernels.ffn.compiled_kernels", lambda: 1 / 0)  # reads gate and up together
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert all(row.sparse_steps == 1 for row in runtime.measured().values())
    unwrap_(model)
    assert len(seen) == (len(sites) if sites[0].gate is not None else 0)


@torch.no_grad()
def test_nan_is_kept_and_seen():
    model, sites, _ = relu_model("llama")
    model.model.layers[0].mlp.gate_proj.weight[3] = float("nan")
    x = torch.randn(2, sites[0].d_model)
    mask = NonZero(model, sites[0], 0.1)(x)
    assert mask[:, 3].all() and 0 < int(mask.sum()) < mask.numel()


def test_file(tmp_path):
    model, sites, _ = relu_model("llama")
    path = tmp_path / "thresholds.json"
    write_thresholds(path, {s: 0.1 * (s.layer + 1) for s in sites}, {"model_id": "a"})
    found = read_thresholds(path)
    assert list(found) == find_sites(model) and list(found.values()) == [0.1, 0.2]
    flip_digit(path, '"threshold"')
    with pytest.raises(ArtifactError, match="is damaged: the checksum"):
        read_thresholds(path)
    path.write_text('{"kind": "activation thresholds", "thresholds": [{}]}')
    with pytest.raises(ArtifactError, match="'site' is missing"):
        read_thresholds(path)
    path.write_text('{"kind": "plan"}')
    with pytest.raises(ArtifactError, match="expected a file of kind 'activation thresholds'"):
        read_thresholds(path)
