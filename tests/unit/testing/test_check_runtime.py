"""Each law of a sparse FFN can fail: one bad FFN per law."""

from __future__ import annotations

import pytest
import torch

from ffnscope.errors import ContractError
from ffnscope.sparse.kernels.ffn import sparse_ffn
from ffnscope.testing import check_runtime

FLOAT = (torch.float32,)


def test_ours() -> None:
    check_runtime()


def test_torch_alone() -> None:
    def in_torch(x, weights, index, act, *, token_mask=None):
        return sparse_ffn(x, by_torch(weights), index, act, token_mask=token_mask)

    check_runtime(in_torch)


def by_torch(weights):
    from ffnscope.sparse.kernels.ffn import RowWeights
    from ffnscope.types import FFNWeights

    gate = None if weights.gate is None else weights.gate.weight
    biases = (weights.gate_bias, weights.up_bias, weights.down_bias)
    return RowWeights.of(FFNWeights(gate, weights.up.weight, weights.down.weight.T, *biases), compiled=False)


def forgets_one(x, weights, index, act, *, token_mask=None):
    return sparse_ffn(x, weights, index[1:], act, token_mask=None if token_mask is None else token_mask[:, 1:])


def ignores_tokens(x, weights, index, act, *, token_mask=None):
    return sparse_ffn(x, weights, index, act)


def changes_x(x, weights, index, act, *, token_mask=None):
    y = sparse_ffn(x, weights, index, act, token_mask=token_mask)
    x.zero_()
    return y


def flat(x, weights, index, act, *, token_mask=None):
    return sparse_ffn(x, weights, index, act, token_mask=token_mask).flatten()


def wide(x, weights, index, act, *, token_mask=None):
    return sparse_ffn(x, weights, index, act, token_mask=token_mask).double()


def noisy(x, weights, index, act, *, token_mask=None):
    y = sparse_ffn(x, weights, index, act, token_mask=token_mask)
    return y + 1e-7 * torch.rand_like(y)


def wants_order(x, weights, index, act, *, token_mask=None):
    y = sparse_ffn(x, weights, index, act, token_mask=token_mask)
    return y if len(index) < 2 or index[0] < index[1] else y + 1


@pytest.mark.parametrize(
    ("bad", "law"),
    [
        (forgets_one, "masked-dense definition: it is off by"),
        (ignores_tokens, "masked-dense definition: .* with channels of their own"),
        (changes_x, "purity: it changed its arguments"),
        (flat, r"shape: returned torch.float32 \(48,\); expected torch.float32 \(1, 48\)"),
        (wide, "shape: returned torch.float64"),
        (noisy, "determinism"),
        (wants_order, "any order of the index"),
    ],
)
def test_a_broken_law_is_named(bad, law: str) -> None:
    with pytest.raises(ContractError, match=law):
        check_runtime(bad, dtypes=FLOAT)
