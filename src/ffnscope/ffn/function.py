"""One FFN as a function of its input: channel activations, and what each channel contributes to the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ffnscope.types import FFNWeights

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class FFN:
    """Weights of a site and its activation function: h = act(gate x) * (up x), or act(up x) where there is no gate.

    Products are taken in the dtype of the weights, all else in float32 (float64 for a float64 model).

    Attributes:
        weights: canonical views.
        act: elementwise activation function.
        name: what messages call it.
    """

    weights: FFNWeights
    act: Activation
    name: str = "the FFN"

    @property
    def d_model(self) -> int:
        """Width of the input."""
        return self.weights.up.shape[1]

    @property
    def d_ff(self) -> int:
        """Number of channels."""
        return self.weights.up.shape[0]

    @property
    def gated(self) -> bool:
        """Whether it has a gate projection."""
        return self.weights.gate is not None

    def activated(self, x: Tensor) -> Tensor:
        """[T, d_model] -> act of the projection that the activation reads (gate, or up without a gate), [T, d_ff]."""
        return self.act(self.activation_input(x))

    def activation_input(self, x: Tensor) -> Tensor:
        """[T, d_model] -> what the activation reads: gate x, or up x where there is no gate, [T, d_ff]."""
        return _product(x, *self.activated_weight)

    def up(self, x: Tensor) -> Tensor:
        """[T, d_model] -> output of the up projection, [T, d_ff]."""
        return _product(x, self.weights.up, self.weights.up_bias)

    def h(self, x: Tensor) -> Tensor:
        """[T, d_model] -> channel activations [T, d_ff]."""
        return self.activated(x) * self.up(x) if self.gated else self.activated(x)

    def contributions(self, x: Tensor) -> Tensor:
        """[T, d_model] -> c [T, d_ff], c_i = |h_i| ||W_down[:, i]||_2: norm of what channel i adds to the output."""
        return self.h(x).abs() * self.down_norms

    @property
    def activated_weight(self) -> tuple[Tensor, Tensor | None]:
        """Weight [d_ff, d_model] and bias of the projection that the activation reads."""
        if self.weights.gate is None:
            return self.weights.up, self.weights.up_bias
        return self.weights.gate, self.weights.gate_bias

    @property
    def down_norms(self) -> Tensor:
        """||W_down[:, i]||_2 of every channel, [d_ff]."""
        return wide(self.weights.down).norm(dim=0)

    def matrix_bytes(self, name: str) -> int:
        """Bytes of the gate, up or down matrix; 0 for a gate that is not there."""
        matrix: Tensor | None = getattr(self.weights, name)
        return 0 if matrix is None else matrix.numel() * matrix.element_size()


def wide(value: Tensor) -> Tensor:
    """The same in float32, or in float64 where it is that."""
    return value if value.dtype == torch.float64 else value.float()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return wide(nn.functional.linear(x.to(weight), weight, bias))
