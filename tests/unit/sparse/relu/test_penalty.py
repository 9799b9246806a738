"""The penalty: its size and gradient against a computation by hand, and its schedule."""

from __future__ import annotations

import pytest
import torch

from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.errors import UsageError
from ffnscope.evaluate.perplexity import perplexity
from ffnscope.ffn.sites import find_sites
from ffnscope.sparse.relu.activation import replace_activation_
from ffnscope.sparse.relu.measure import measure_zeros
from ffnscope.sparse.relu.penalty import PROSPARSE, Penalty, ProgressiveL1, Stage
from tiny import tiny, tokens


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
def test_size_gradient_and_zeros(arch):
    model = tiny(arch)
    sites = replace_activation_(model)
    ids, valid = tokens(2, 8), torch.ones(2, 8, dtype=torch.bool)
    valid[1, 5:] = False
    penalty = Penalty(sites)
    with penalty.of(model, valid):
        model(input_ids=ids, attention_mask=valid.long())
    seen = {}
    handles = [
        model.get_submodule(f"{s.path}.{s.down}" if s.path else s.down).register_forward_pre_hook(
            lambda m, args, s=s: seen.__setitem__(s, args[0].reshape(-1, s.d_ff))
        )
        for s in sites
    ]
    model(input_ids=ids, attention_mask=valid.long())
    for handle in handles:
        handle.remove()
    rows = [seen[s][valid.flatten()] for s in sites]
    expected = sum(h.abs().mean() for h in rows) / len(rows)
    torch.testing.assert_close(penalty.size(), expected)
    assert penalty.zeros() == pytest.approx(sum(float((h == 0).float().mean()) for h in rows) / len(rows))
    weight = next(model.get_submodule(f"{sites[0].path}.{sites[0].up}" if sites[0].path else sites[0].up).parameters())
    (found,) = torch.autograd.grad(penalty.size(), weight)
    (wanted,) = torch.autograd.grad(expected, weight)
    torch.testing.assert_close(found, wanted)
    assert float(found.abs().sum()) > 0
    assert not any(m._forward_pre_hooks for m in model.modules())


class TestSchedule:
    def test_prosparse_by_hand(self):
        found = ProgressiveL1()
        at = lambda step: found.weight(step / 16500)  # noqa: E731
        assert at(0) == at(4999) == 0
        assert at(5000) == pytest.approx(5e-3) == at(5999)
        assert at(6000) == pytest.approx(5e-3)
        assert at(8000) == pytest.approx((5e-3 + 5e-2) / 2)
        assert at(11000) == pytest.approx(5e-2)
        assert at(14000) == pytest.approx((5e-2 + 2e-1) / 2)
        assert at(16400) == pytest.approx(2e-1) == found.weight(1.0)

    def test_scaled(self):
        found = ProgressiveL1.up_to(2.0)
        assert found.weight(1.0) == pytest.approx(2.0)
        assert [s.weight / 10 for s in found.stages] == pytest.approx([s.weight for s in PROSPARSE])
        assert ProgressiveL1.up_to(0.0).weight(0.9) == 0

    @pytest.mark.parametrize(
        ("stages", "message"),
        [
            ([], "must end at rising shares"),
            ([Stage(1.0, 0.5)], "the last one at 1"),
            ([Stage(1.0, 0.5), Stage(1.0, 0.5), Stage(1.0, 1)], "rising"),
            ([Stage(0.0, 0.0), Stage(1.0, 1)], "rising"),
            ([Stage(-1.0, 1)], "0 or more"),
            ([Stage(float("nan"), 1)], "0 or more"),
        ],
    )
    def test_impossible(self, stages, message):
        with pytest.raises(UsageError, match=message):
            ProgressiveL1(stages)


def test_zero_shares_by_hand():
    model = tiny("llama_relu")
    sites = find_sites(model)
    windows = contiguous_windows(tokens(3, 10), "random")
    found = measure_zeros(model, windows, sites, batch_size=2)
    assert found.perplexity == perplexity(model, windows)
    with torch.no_grad():
        seen = []
        handles = [
            model.get_submodule(f"{s.path}.{s.gate}").register_forward_hook(lambda m, a, out: seen.append(out))
            for s in sites
        ]
        model(input_ids=windows.input_ids)
    for handle in handles:
        handle.remove()
    expected = [float((gate <= 0).double().mean()) for gate in seen]
    assert list(found.zeros.values()) == pytest.approx(expected)
    assert found.sparsity == pytest.approx(sum(expected) / 2)
    assert measure_zeros(tiny("llama"), windows, find_sites(tiny("llama"))).sparsity == 0
