"""Predictors by hand and against what they must reduce to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ffnscope.errors import UsageError
from ffnscope.ffn.function import FFN
from ffnscope.registry import PREDICTORS
from ffnscope.sparse.costs import predictor_bytes, sparse_bytes
from ffnscope.sparse.predictors.exact import exact_gate, exact_up, oracle
from ffnscope.sparse.predictors.fc_files import write_fc_predictors
from ffnscope.sparse.predictors.fixed import PromptConstant, griffin, static
from ffnscope.sparse.predictors.fixed import random as chance
from ffnscope.sparse.predictors.interface import FitTokens
from ffnscope.sparse.predictors.low_bit import LowBit, low_bit
from ffnscope.sparse.predictors.low_rank import low_rank
from ffnscope.sparse.predictors.packing import pack, unpack
from ffnscope.sparse.predictors.sign_bit import sign_bit
from ffnscope.sparse.predictors.whitened_svd import whitened_svd
from ffnscope.types import FFNWeights

D_MODEL, D_FF = 12, 40


def ffn(gated: bool = True, dtype: torch.dtype = torch.float64, act: str = "silu") -> FFN:
    random = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(D_FF, D_MODEL, generator=random, dtype=torch.float64).to(dtype) for _ in range(2))
    down = torch.randn(D_MODEL, D_FF, generator=random, dtype=torch.float64).to(dtype)
    bias = torch.randn(D_FF, generator=random, dtype=torch.float64).to(dtype)
    return FFN(FFNWeights(gate if gated else None, up, down, None, bias), getattr(nn.functional, act))


X = torch.randn(200, D_MODEL, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
FIT = FitTokens(X)


def c(one: FFN) -> Tensor:
    return one.contributions(X)


class TestByHand:
    """gate = [1, -2], up = [3, 1], down norms 2 and 5; ReLU."""

    small = FFN(
        FFNWeights(
            torch.tensor([[1.0, 0.0], [0.0, -2.0]]),
            torch.tensor([[3.0, 0.0], [0.0, 1.0]]),
            torch.tensor([[2.0, 3.0], [0.0, 4.0]]),
        ),
        nn.functional.relu,
    )
    x = torch.tensor([[1.0, -1.0], [2.0, 1.0]])

    def test_oracle(self) -> None:
        assert oracle(self.small)(self.x).tolist() == [[6.0, 10.0], [24.0, 0.0]]
        assert oracle(self.small, norm=False)(self.x).tolist() == [[3.0, 2.0], [12.0, 0.0]]

    def test_exact_gate(self) -> None:  # sqrt(E[u^2]) = sqrt((9 + 36) / 2) and 1
        size = 22.5**0.5
        assert exact_gate(self.small, None, up_size=False, norm=False)(self.x).tolist() == [[1, 2], [2, 0]]
        found = exact_gate(self.small, FitTokens(self.x))(self.x)
        assert torch.allclose(found, torch.tensor([[2 * size, 10.0], [4 * size, 0.0]]))

    def test_exact_up(self) -> None:  # E|relu(g)| = 1.5 and 1
        assert exact_up(self.small, None, gate_size=False, norm=False)(self.x).tolist() == [[3, 1], [6, 1]]
        assert exact_up(self.small, FitTokens(self.x))(self.x).tolist() == [[9, 5], [18, 5]]

    def test_static(self) -> None:
        assert static(self.small, FitTokens(self.x))(self.x).tolist() == [[15.0, 5.0]] * 2
        assert static(self.small, None, kept=torch.tensor([1]))(self.x).tolist() == [[0.0, 1.0]] * 2

    def test_griffin_scales_every_token_to_length_one(self) -> None:  # h = (3, -2), (12, 0)
        first = 9 / 13 + 1
        found = griffin(self.small, FitTokens(self.x))(self.x[:1])
        assert torch.allclose(found, torch.tensor([[first**0.5, (4 / 13) ** 0.5]]))

    def test_griffin_takes_a_new_prompt(self) -> None:
        made = griffin(self.small, FitTokens(self.x))
        assert isinstance(made, PromptConstant)
        made.begin(self.x[1:])
        assert made(self.x).tolist() == [[1.0, 0.0]] * 2

    def test_sign_bit(self) -> None:
        weights = FFNWeights(torch.tensor([[1.0, -1.0], [-1.0, -1.0]]), torch.ones(2, 2), torch.ones(2, 2))
        found = sign_bit(FFN(weights, nn.functional.relu))(self.x)
        assert found.tolist() == [[1.0, 0.5], [0.5, 0.0]]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_packed_codes_come_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (7, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() == -(-35 * bits // 8)
    assert torch.equal(unpack(packed, bits, 35).view(7, 5), codes)


class TestLowBit:
    @pytest.mark.parametrize("gated", [True, False])
    def test_the_error_falls_with_bits(self, gated: bool) -> None:
        one = ffn(gated)
        errors = [float((low_bit(one, bits=b, group=4)(X) - c(one)).norm()) for b in (2, 3, 4, 6, 8)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.02 * float(c(one).norm())

    def test_smaller_groups_are_nearer(self) -> None:
        one = ffn()
        errors = [float((low_bit(one, bits=3, group=g)(X) - c(one)).norm()) for g in (12, 6, 3)]
        assert errors == sorted(errors, reverse=True)

    def test_two_values_per_group_need_no_more_than_two_bits(self) -> None:
        one = ffn()
        assert torch.allclose(low_bit(one, bits=2, group=2)(X), c(one), rtol=0.05, atol=0.05)

    @pytest.mark.parametrize("group", [5, 8, 64])
    def test_widths_that_are_no_multiple_of_the_group(self, group: int) -> None:
        one = ffn()
        assert torch.allclose(low_bit(one, bits=8, group=group)(X), c(one), atol=0.03 * float(c(one).max()))

    def test_bytes(self) -> None:
        found = low_bit(ffn(dtype=torch.bfloat16), bits=4, group=4)
        assert isinstance(found, LowBit)
        codes, scales, norms = 2 * D_FF * D_MODEL // 2, 2 * D_FF * (D_MODEL // 4) * 2 * 2, D_FF * 4
        assert found.bytes_read == codes + scales + norms
        found(X)
        assert found.bytes_read == codes + scales + norms  # what computes is not what is read


class TestWhitenedSVD:
    @pytest.mark.parametrize("gated", [True, False])
    def test_exact_at_full_rank(self, gated: bool) -> None:
        one = ffn(gated)
        assert torch.allclose(whitened_svd(one, FIT, rank=D_MODEL)(X), c(one))

    def test_the_error_falls_with_the_rank(self) -> None:
        one = ffn()
        errors = [float((whitened_svd(one, FIT, rank=r)(X) - c(one)).norm()) for r in (2, 5, 8, 11, 12)]
        assert errors == sorted(errors, reverse=True)

    def test_no_other_matrix_of_the_rank_is_nearer_on_the_inputs(self) -> None:
        one = ffn(gated=False, act="relu")
        x = X * torch.linspace(0.1, 3, D_MODEL, dtype=torch.float64)
        made = whitened_svd(one, FitTokens(x), rank=4, damping=1e-9)
        found = x @ (made.gate.outer @ made.gate.inner).T
        u, s, v = torch.linalg.svd(x @ one.weights.up.T, full_matrices=False)
        best = u[:, :4] * s[:4] @ v[:4]
        assert torch.allclose(found, best, atol=1e-6)

    def test_inputs_of_few_directions_need_few_ranks(self) -> None:
        one = ffn()
        narrow = X[:, :3] @ torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        made = whitened_svd(one, FitTokens(narrow), rank=3, damping=1e-8)
        assert torch.allclose(made(narrow), one.contributions(narrow), rtol=1e-3, atol=1e-3)

    def test_fewer_tokens_than_inputs(self) -> None:
        assert bool(torch.isfinite(whitened_svd(ffn(), FitTokens(X[:2]), rank=4)(X)).all())


class TestBytes:
    matrix = D_FF * D_MODEL * 2

    def test_what_is_read(self) -> None:
        one = ffn(dtype=torch.bfloat16)
        x = FitTokens(X.bfloat16())
        norms = D_FF * 4
        assert oracle(one).bytes_read == 2 * self.matrix + norms
        assert exact_gate(one, x).bytes_read == self.matrix + norms
        assert exact_gate(one, x).reads == {"gate"}
        assert static(one, x).bytes_read == griffin(one, x).bytes_read == chance(one).bytes_read == 0
        assert sign_bit(one).bytes_read == D_FF * D_MODEL // 8
        assert whitened_svd(one, x, rank=3, up=False).bytes_read == 3 * (D_MODEL + D_FF) * 2 + norms

    def test_with_what_is_kept(self) -> None:
        one = ffn(dtype=torch.bfloat16)
        gate = exact_gate(one, None, up_size=False)
        assert sparse_bytes(gate, 0.25) == predictor_bytes(gate) + 0.25 * 2 * self.matrix
        assert sparse_bytes(chance(one), 0.5) == 1.5 * self.matrix


def test_random_depends_on_token_and_seed_alone() -> None:
    one = ffn()
    first = chance(one)(X)
    assert torch.equal(first.flip(0), chance(one)(X.flip(0)))
    assert not torch.equal(first, chance(one, seed=1)(X))
    assert float(first.mean()) == pytest.approx(0.5, abs=0.02)
    assert chance(one)(X[:0]).shape == (0, D_FF)


@pytest.mark.parametrize("name", PREDICTORS.names())
def test_inputs_of_another_shape(name: str, tmp_path: Path) -> None:
    params = {
        "whitened_svd": {"rank": 2},
        "low_rank": {"rank": 2, "epochs": 1},
        "fc_files": {"folder": str(tmp_path), "layer": 0, "before_norm": False},
        "deja_vu": {"rank": 2, "epochs": 1},
    }.get(name, {})
    if name == "fc_files":
        write_fc_predictors(tmp_path, [low_rank(ffn(), FIT, rank=2, epochs=1)])
    made = PREDICTORS.get(name).make(ffn(), FIT, **params)
    for bad in (X[None], X[:, 1:]):
        with pytest.raises(UsageError, match=r"\[T, 12\]"):
            made(bad)


@pytest.mark.parametrize("name", ["exact_gate", "exact_up", "static", "griffin", "whitened_svd", "low_rank", "deja_vu"])
def test_tokens_that_are_missing(name: str) -> None:
    with pytest.raises(UsageError, match="FitTokens"):
        PREDICTORS.get(name).make(ffn(), None)


def test_impossible_parameters() -> None:
    for make, message in (
        (lambda: low_bit(ffn(), bits=1), r"\[2, 8\]"),
        (lambda: low_bit(ffn(), group=1), "at least 2"),
        (lambda: whitened_svd(ffn(), FIT, rank=13), r"\[1, 12\]"),
        (lambda: whitened_svd(ffn(), FIT, rank=2, damping=0.0), "positive"),
        (lambda: static(ffn(), None, kept=torch.tensor([40])), r"\[0, 40\)"),
        (lambda: exact_gate(ffn(gated=False), FIT), "has no gate"),
        (lambda: exact_up(ffn(gated=False), FIT), "has no gate"),
        (lambda: FitTokens(X[:0]), "at least 1"),
        (lambda: FitTokens(X, torch.zeros(3)), "3 rows"),
    ):
        with pytest.raises(UsageError, match=message):
            make()
