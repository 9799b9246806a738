"""The FFN of a site as a function of its input, and the name of its activation function."""

from __future__ import annotations

from torch import Tensor, nn

from ffnscope.errors import NotAvailableError, UsageError
from ffnscope.ffn.function import FFN, Activation, wide
from ffnscope.ffn.projection import reuse, weights_of
from ffnscope.types import FFNSite

CANDIDATES = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu")
"""Activation functions that are tried where the config names none."""


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


def check_input(ffn: FFN, x: Tensor) -> None:
    """Raise UsageError unless x is [T, d_model]."""
    if x.dim() != 2 or x.shape[1] != ffn.d_model:
        raise UsageError(
            f"inputs of {ffn.name} must be [T, {ffn.d_model}] = [T, d_model]; got {tuple(x.shape)}. Flatten batch and "
            "time first."
        )
