"""A matrix of which single rows are read: the one place that chooses between compiled code and torch."""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.sparse.kernels import gathered

COMPILED_DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")
"""Activations that compiled code knows, by their number there."""
INSTALL = "pip install 'ffnscope[sparse]'"


@lru_cache(maxsize=1)
def has_compiler() -> bool:
    """Whether numba, the optional extra "sparse", is installed."""
    return importlib.util.find_spec("numba") is not None


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton is installed, as it is with torch for CUDA."""
    return importlib.util.find_spec("triton") is not None


def why_not_compiled(weight: Tensor) -> str | None:
    """Why rows of a matrix are read by torch, which copies them first, and what to do; None when they are not."""
    if weight.device.type == "cuda":
        if weight.dtype not in GPU_DTYPES:
            return f"its weights are {weight.dtype}, and compiled kernels read float32, bfloat16 and float16 on a GPU"
        return None if has_triton() else "triton is not installed; pip install triton"
    if weight.device.type != "cpu":
        return f"its weights are on {weight.device}, and compiled kernels are for the CPU and CUDA"
    if weight.dtype not in COMPILED_DTYPES:
        return f"its weights are {weight.dtype}, and compiled kernels read float32 and bfloat16"
    return None if has_compiler() else f"numba is not installed; {INSTALL}"


class RowMatrix:
    """A matrix [n, width], row by row in memory, for products with some of its rows.

    Sums are accumulated in float32 by compiled code (float32 and bfloat16 on a CPU, where numba is installed; these and
    float16 on CUDA, where triton is), and as torch does it otherwise. The number of threads is torch's.

    Args:
        weight: [n, width]. Its memory is used where rows are contiguous, and copied otherwise.
        compiled: False takes torch even where compiled code is possible.

    Raises:
        UsageError: not a floating matrix.
    """

    def __init__(self, weight: Tensor, *, compiled: bool = True):
        if weight.dim() != 2 or not weight.is_floating_point():
            raise UsageError(f"expected a floating matrix [n, width]; got {weight.dtype} {tuple(weight.shape)}.")
        self.weight = weight.detach().contiguous()
        self.copied_bytes = 0 if self.weight.data_ptr() == weight.data_ptr() else self.weight.nbytes
        self.array: Any = None
        self.on_gpu = False
        if compiled and why_not_compiled(weight) is None:
            self.on_gpu = weight.is_cuda
            self.array = None if self.on_gpu else _as_array(self.weight)

    @property
    def compiled(self) -> bool:
        """Whether compiled code reads the rows."""
        return self.on_gpu or self.array is not None

    def dot(self, x: Tensor, index: Tensor) -> Tensor:
        """Products of x [T, width] with rows ``index`` [k] int32 -> [T, k] in the dtype of x."""
        if self.on_gpu:
            return gpu_kernels().rows_dot(self.weight, x, index).to(x.dtype)
        if self.array is None:
            return gathered.rows_dot(self.weight, x.to(self.weight.dtype), index).to(x.dtype)
        found = compiled_kernels().rows_dot(self.array, as_float32(x), index.numpy(), n_parts(index))
        return torch.from_numpy(found).to(x.dtype)

    def sum(self, h: Tensor, index: Tensor) -> Tensor:
        """Sum of rows ``index`` [k] int32, each times h [T, k] -> [T, width] in the dtype of h."""
        if self.on_gpu:
            return gpu_kernels().rows_sum(self.weight, h, index).to(h.dtype)
        if self.array is None:
            return gathered.rows_sum(self.weight, h.to(self.weight.dtype), index).to(h.dtype)
        found = compiled_kernels().rows_sum(self.array, as_float32(h), index.numpy(), n_parts(index))
        return torch.from_numpy(found).to(h.dtype)


def compiled_kernels() -> Any:
    """The module of compiled code."""
    # a static import would load numba with this module; `importlib` looks into sys.modules first
    return importlib.import_module("ffnscope.sparse.kernels.compiled")


def gpu_kernels() -> Any:
    """The module of code that Triton compiles."""
    return importlib.import_module("ffnscope.sparse.kernels.on_gpu")


def _as_array(weight: Tensor) -> Any:
    return (weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight).numpy()


def as_float32(values: Tensor) -> Any:
    """Array of values as compiled code takes them."""
    return values.detach().float().contiguous().numpy()


def n_parts(index: Tensor) -> int:
    """Threads that share the rows; 8 or more rows each."""
    return max(1, min(torch.get_num_threads(), index.numel() // 8))
