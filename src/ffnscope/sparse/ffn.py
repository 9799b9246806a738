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
CANDIDATES = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu")
"""Activation functions that are tried where the config names none."""


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


def ffn_of(model: nn.Module, site: FFNSite, activation: str | None = None) -> FFN:
    """The FFN of a site as a function of its input.

    Its activation is that which `transformers` knows by the name in the config, or by the name given here. Whether the
    model computes nothing else between the projections is not seen here: `find_activation` compares with activations of
    the model itself.

    Raises:
        NotAvailableError: an FFN that is used several times, with a norm before down or adapters, or whose activation
            is not known by name.
        ModelError: the weights are offloaded, and this is not inside `materialised`.
    """
    check_site(site)
    return FFN(weights_of(model, site), activation_named(activation or site.activation, site.name), site.name)


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


def activation_named(name: str, of: str) -> Activation:
    """The elementwise activation function that `transformers` knows by a name.

    Raises:
        NotAvailableError: it knows none.
    """
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise NotAvailableError(
            f"the activation function of {of} is called {name!r}, which transformers does not know. Give ffn_of one of "
            "its names, such as 'silu', 'gelu' or 'relu'; traces tell which it is (Traces.activation)."
        )
    return ACT2FN[name]


def find_activation(model: nn.Module, site: FFNSite, x: Tensor, h: Tensor) -> str:
    """Name of the activation with which weights and inputs x [T, d_model] give the activations h [T, d_ff] of a model.

    It is the one of the config where that has a known name, else the nearest of `CANDIDATES`. A hundredth of the
    largest activation may be lacking, since kernels of low precision round differently.

    Raises:
        NotAvailableError: none does; something else happens between the projections.
    """
    from transformers.activations import ACT2FN

    names = (site.activation,) if site.activation in ACT2FN else CANDIDATES
    made = [ffn_of(model, site, name) for name in names]
    lacks = [float((one.h(x) - wide(h)).abs().max()) for one in made]
    best = min(range(len(names)), key=lacks.__getitem__)
    if not lacks[best] <= 1e-2 * float(wide(h).abs().max()):
        raise NotAvailableError(
            f"{site.name} computes something else between its projections than act(gate x) * (up x) with "
            f"{' or '.join(names)}; its channels cannot be recomputed from its input, so contextual sparsity is not "
            "available there. Leave this site out."
        )
    return names[best]


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
