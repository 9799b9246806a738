"""One FFN as a function of its input: channel activations, and what each channel contributes to the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ffnscope.errors import NotAvailableError, UsageError
from ffnscope.ffn.projection import reuse, weights_of
from ffnscope.types import FFNSite, FFNWeights

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
        gate, bias = self.activated_weight
        return self.act(_product(x, gate, bias))

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


def ffn_of(model: nn.Module, site: FFNSite) -> FFN:
    """The FFN of a site as a function of its input.

    Its activation is that which `transformers` knows by the name in the config. Whether the model computes nothing else
    between the projections is not seen here: `check_ffn` compares with activations of the model itself.

    Raises:
        NotAvailableError: an FFN that is used several times, with a norm before down or adapters, or whose activation
            is not known by name.
        ModelError: the weights are offloaded, and this is not inside `materialised`.
    """
    check_site(site)
    return FFN(weights_of(model, site), activation_named(site.activation, site.name), site.name)


def check_site(site: FFNSite) -> None:
    """Raise NotAvailableError for an FFN whose channels are no function of gate, up and input alone."""
    if site.n_uses > 1:
        raise NotAvailableError(f"{site.name} {reuse(site)}; contextual sparsity supports FFNs that are used once.")
    for part, what in ((site.norm, "a norm before its down projection"), (site.adapters, "adapters")):
        if part:
            raise NotAvailableError(
                f"{site.name} has {what}, so its channels are no function of gate, up and input alone; contextual "
                "sparsity is not available there. Leave this site out."
            )
    activation_named(site.activation, site.name)


def activation_named(name: str, of: str) -> Activation:
    """The elementwise activation function that `transformers` knows by a name.

    Raises:
        NotAvailableError: it knows none.
    """
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise NotAvailableError(
            f"the activation function of {of} is called {name!r}, which transformers does not know; contextual "
            "sparsity needs one of its ACT2FN, such as 'silu', 'gelu' or 'relu'."
        )
    return ACT2FN[name]


def check_ffn(ffn: FFN, x: Tensor, h: Tensor) -> None:
    """Raise NotAvailableError unless ``ffn`` gives the channel activations h [T, d_ff] that a model had for x.

    A hundredth of the largest activation may be lacking, since kernels of low precision round differently.
    """
    if not len(h):
        return
    found, largest = ffn.h(x), wide(h).abs().max()
    if not bool((found - wide(h)).abs().max() <= 1e-2 * largest):
        raise NotAvailableError(
            f"{ffn.name} computes something else between its projections than act(gate x) * (up x) with its activation "
            "function; its channels cannot be recomputed from its input, so contextual sparsity is not available "
            "there. Leave this site out."
        )


def wide(value: Tensor) -> Tensor:
    """The same in float32, or in float64 where it is that."""
    return value if value.dtype == torch.float64 else value.float()


def check_input(ffn: FFN, x: Tensor) -> None:
    """Raise UsageError unless x is [T, d_model]."""
    if x.dim() != 2 or x.shape[1] != ffn.d_model:
        raise UsageError(
            f"inputs of {ffn.name} must be [T, {ffn.d_model}] = [T, d_model]; got {tuple(x.shape)}. Flatten batch and "
            "time first."
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return wide(nn.functional.linear(x.to(weight), weight, bias))
