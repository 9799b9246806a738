"""Cheaper dense FFNs: what they read, what they compute, and the model as it was."""

from __future__ import annotations

import pytest
import torch

from ffnscope.errors import UsageError
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.plan.build import build_plan
from ffnscope.sparse.costs import bits_for, low_bit_share, matrix_bytes, predictor_bytes, rank_for, sparse_bytes
from ffnscope.sparse.evaluation import compare_forms, form_losses
from ffnscope.sparse.ffn import ffn_of
from ffnscope.sparse.forms import dense_bytes, low_bit_form, low_rank_form, pruned_form, weights_replaced
from ffnscope.sparse.predictors.exact import exact_gate, oracle
from ffnscope.sparse.predictors.fixed import random as chance
from ffnscope.sparse.predictors.interface import FitTokens
from ffnscope.sparse.predictors.low_bit import low_bit
from ffnscope.sparse.predictors.low_rank import LowRank
from ffnscope.sparse.tracing import trace
from ffnscope.types import Scores
from reference import exact, text
from tiny import D_FF, HIDDEN, logits, tiny

MATRIX = 2 * D_FF * HIDDEN


class TestBytes:
    def test_floats_count_sixteen_bits(self) -> None:
        model = tiny("llama")
        ffn = ffn_of(model, find_sites(model)[0])
        assert matrix_bytes(ffn) == 3 * MATRIX
        assert dense_bytes(model) == 2 * 3 * MATRIX
        assert predictor_bytes(LowRank(ffn, 8, relu=True)) == 2 * 8 * (D_FF + HIDDEN)
        assert predictor_bytes(chance(ffn)) == 0
        assert predictor_bytes(low_bit(ffn, bits=4, group=16)) == 2 * (D_FF * HIDDEN * (4 + 2) / 8) + 2 * D_FF

    def test_no_matrix_is_read_twice(self) -> None:
        model = tiny("llama")
        ffn = ffn_of(model, find_sites(model)[0])
        gate = exact_gate(ffn, FitTokens(torch.randn(4, HIDDEN)))
        assert sparse_bytes(gate, 0.25) == MATRIX + 2 * D_FF + 0.25 * 2 * MATRIX
        assert sparse_bytes(oracle(ffn), 0.25) == 2 * MATRIX + 2 * D_FF + 0.25 * MATRIX

    def test_bfloat16_is_counted_as_it_is(self) -> None:
        model = tiny("llama", dtype=torch.bfloat16)
        assert matrix_bytes(ffn_of(model, find_sites(model)[0])) == 3 * MATRIX

    def test_bits_and_ranks_that_fit(self) -> None:
        assert low_bit_share(4, 64) == pytest.approx(4.5 / 16)
        assert [bits_for(share) for share in (0.16, 0.29, 0.5, 1.0)] == [2, 4, 7, 8]
        with pytest.raises(UsageError, match="fewer than 2 bits"):
            bits_for(0.1)
        ffn = ffn_of(tiny("llama"), find_sites(tiny("llama"))[0])
        assert rank_for(ffn, 0.5, 3) == int(0.5 * D_FF * HIDDEN / (D_FF + HIDDEN))
        assert rank_for(ffn, 9.0, 3) == HIDDEN
        with pytest.raises(UsageError, match="rank 1"):
            rank_for(ffn, 0.01, 3)


@pytest.mark.parametrize("arch", ["llama", "phi3", "gpt2", "opt", "llama_bias"])
class TestOtherWeights:
    def test_eight_bits_are_near_and_two_are_not(self, arch) -> None:
        model, windows = tiny(arch), text(4)
        before = logits(model)
        forms = [low_bit_form(model, bits, group=16) for bits in (8, 2)]
        off = []
        for form in forms:
            with form.applied(model, 0):
                off.append(float((logits(model) - before).norm() / before.norm()))
        assert off[0] < 0.02 < 0.2 < off[1]
        rows = compare_forms(model, forms, windows)
        assert torch.equal(before, logits(model))
        assert [row.label for row in rows] == ["dense", "8-bit dense FFN", "2-bit dense FFN"]
        assert [row.bytes_share for row in rows] == [1, pytest.approx(10 / 16), pytest.approx(4 / 16)]
        assert rows[1].density is None

    def test_full_rank_is_the_dense_model(self, arch, tmp_path) -> None:
        model, windows = exact(arch) if arch != "opt" else tiny(arch, dtype=torch.float64), text(6)
        form = low_rank_form(model, trace(model, windows, tmp_path / "t"), 10.0)
        dense = form_losses(model, None, windows)
        assert torch.allclose(form_losses(model, form, windows).nll, dense.nll, atol=1e-5)


def test_rank_beats_plain_truncation_on_its_text(tmp_path) -> None:
    model, windows = exact("llama"), text(24)
    traces = trace(model, windows, tmp_path / "t")
    form = low_rank_form(model, traces, 0.5)
    for site in traces.sites:
        ffn, rank = ffn_of(model, site), rank_for(ffn_of(model, site), 0.5, 3)
        x = traces.x(site, "fit")
        for name, inputs in (("gate", x), ("down", ffn.h(x))):
            weight = getattr(ffn.weights, name)
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            plain = u[:, :rank] * s[:rank] @ v[:rank]
            found = form.weights[site][name]
            assert torch.linalg.matrix_rank(found) == rank
            assert (inputs @ (found - weight).T).norm() < (inputs @ (plain - weight).T).norm()


def test_a_plan_is_a_form() -> None:
    model, windows = tiny("llama"), text(4)
    sites = find_sites(model)
    plan = build_plan(Scores("made up", {s: torch.arange(float(s.d_ff)) for s in sites}), 0.5, "local")
    (_, row) = compare_forms(model, [pruned_form(model, "half", plan)], windows)
    assert row.bytes_share == pytest.approx(0.5) and row.difference.value != 0


def test_values_of_another_shape() -> None:
    model = tiny("llama")
    site = find_sites(model)[0]
    before = weights_of(model, site).up.clone()
    wrong = {site: {"up": torch.zeros(D_FF, HIDDEN), "down": torch.zeros(3, 3)}}
    with pytest.raises(UsageError, match="got new values"), weights_replaced(model, wrong):
        pass
    assert torch.equal(before, weights_of(model, site).up)
