"""Which norms between activation and down projection can be narrowed: those whose law holds, epsilon included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ffnscope.ffn.inner_norm import is_rms_norm, narrow_norm_, narrow_norm_weight

D_FF = 24


class Norm(nn.Module):
    """RMS norm as most code writes it."""

    def __init__(self, d_ff: int = D_FF, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_ff))
        self.variance_epsilon = eps

    def scale(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * self.scale(x)


class OtherName(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.epsilon = self.__dict__.pop("variance_epsilon")

    def scale(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)


class InTheCode(Norm):
    def scale(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Outside(Norm):
    def scale(self, x: Tensor) -> Tensor:
        return 1 / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class Sum(Norm):
    def scale(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x.pow(2).sum(-1, keepdim=True))


class Shifted(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * x * self.scale(x)


class Gated(Norm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate


class Biased(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(D_FF))


@pytest.mark.parametrize("norm", [Norm, lambda: Norm(eps=1e-12), lambda: nn.RMSNorm(D_FF)])
def test_rms_norms(norm: Callable[[], nn.Module]) -> None:
    assert is_rms_norm(norm(), D_FF)


@pytest.mark.parametrize(
    "norm", [OtherName, InTheCode, Outside, Sum, Shifted, Gated, Biased, lambda: nn.LayerNorm(D_FF)]
)
def test_what_a_factor_does_not_make_up_for(norm: Callable[[], nn.Module]) -> None:
    assert not is_rms_norm(norm(), D_FF)


def test_a_norm_of_another_width() -> None:
    assert not is_rms_norm(Norm(), D_FF + 1)


def test_trying_changes_nothing() -> None:
    norm = Norm()
    before = dict(vars(norm)), norm.weight
    is_rms_norm(norm, D_FF)
    assert (dict(vars(norm)), norm.weight) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_epsilon_that_follows_from_the_dtype(dtype: torch.dtype) -> None:
    norm, x = nn.RMSNorm(D_FF, dtype=dtype), torch.zeros(1, D_FF, dtype=dtype)
    x[:, :6] = 1e-3
    expected = norm(x)[:, :6]
    norm.weight.data = narrow_norm_weight(norm.weight.data[:6], D_FF)
    narrow_norm_(norm, D_FF, 6)
    assert torch.allclose(norm(x[:, :6]), expected, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
def test_a_narrow_norm_gives_what_the_wide_one_gives_for_zeros(size: float) -> None:
    random = torch.Generator().manual_seed(1)
    norm, kept = Norm(), torch.tensor([0, 3, 4, 20])
    norm.weight.data.uniform_(0.5, 2, generator=random)
    x = torch.zeros(5, D_FF).index_add_(1, kept, torch.randn(5, 4, generator=random, dtype=torch.float32) * size)
    expected = norm(x)
    norm.weight.data = narrow_norm_weight(norm.weight.data[kept], D_FF)
    without_epsilon = norm(x[:, kept])
    narrow_norm_(norm, D_FF, len(kept))
    assert torch.allclose(norm(x[:, kept]), expected[:, kept], rtol=1e-5)
    assert torch.allclose(without_epsilon, expected[:, kept], rtol=1e-5) == (size == 1)
