"""Triton's kernels by its interpreter, on the CPU; tests/gpu runs them for real. Skipped without triton."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("kernels are tested on the GPU itself", allow_module_level=True)
if "triton" in sys.modules and "TRITON_INTERPRET" not in os.environ:
    pytest.skip("triton was imported without its interpreter; run this file alone", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when functions are decorated, triton's own ones too

from ffnscope.sparse.kernels import on_gpu
from ffnscope.sparse.kernels.ffn import IN_TORCH
from ffnscope.sparse.kernels.rows import ACTIVATIONS


def drawn(k, *, n=70, width=300, tokens=2, dtype=torch.float32):
    random = torch.Generator().manual_seed(k)
    gate, up = (torch.randn(n, width, generator=random).to(dtype) / width**0.5 for _ in range(2))
    x = torch.randn(tokens, width, generator=random).to(dtype)
    return gate, up, x, torch.randperm(n, generator=random)[:k].sort().values.int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [0, 1, 8, 33, 70])
def test_products_and_sums(k, dtype):
    gate, _, x, index = drawn(k, dtype=dtype)
    rows = gate[index.long()].float()
    found = on_gpu.rows_dot(gate, x, index)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x.float() @ rows.T, atol=1e-4, rtol=1e-4)
    h = torch.randn(2, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(on_gpu.rows_sum(gate, h, index), h.float() @ rows, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gated(act, with_biases):
    gate, up, x, index = drawn(21)
    biases = tuple(torch.randn(70, generator=torch.Generator().manual_seed(i)) for i in range(2))
    g, u = (x @ w[index.long()].T for w in (gate, up))
    if with_biases:
        g, u = (one + bias[index.long()] for one, bias in zip((g, u), biases, strict=True))
    found = on_gpu.rows_gated(gate, up, biases if with_biases else None, ACTIVATIONS.index(act), x, index)
    torch.testing.assert_close(found, IN_TORCH[act](g) * u, atol=1e-5, rtol=1e-4)


def test_many_rows_in_slices():
    gate, _, _, index = drawn(3000, n=3000, width=65)
    h = torch.randn(1, 3000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(on_gpu.rows_sum(gate, h, index), h @ gate[index.long()], atol=1e-3, rtol=1e-4)
