"""Taps on channel activations: the only place that hooks them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

from torch import Tensor, nn

from ffnscope.ffn.projection import down_projection
from ffnscope.types import FFNSite

OnActivation = Callable[[FFNSite, Tensor], None]
OnGradient = Callable[[FFNSite, Tensor, Tensor], None]


@contextlib.contextmanager
def channel_taps(
    model: nn.Module,
    sites: Sequence[FFNSite],
    on_activation: OnActivation | None,
    on_gradient: OnGradient | None = None,
) -> Generator[None]:
    """Call back with h [batch, T, d_ff] in the forward, and with h and its gradient in the backward.

    A model that flattens tokens before its FFN (OPT) gives [batch * T, d_ff]. h and g are views: do not change them.

    When gradients are wanted and nothing before a site needs one (weights are frozen), its h starts the autograd
    graph: the backward ends at the first tapped site. All hooks are removed on exit, also after an exception.
    """
    handles: list[Any] = []
    try:
        for site in sites:
            hook = _forward_hook(site, on_activation, on_gradient)
            handles.append(down_projection(model, site).register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Generator[None]:
    """Put the model in eval mode without weight gradients; restore both on exit."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training


def _forward_hook(site: FFNSite, on_activation: OnActivation | None, on_gradient: OnGradient | None) -> Any:
    def watch(h: Tensor, values: Tensor, call: OnGradient) -> None:
        # the closure holds the detached values: holding h itself would be a reference cycle
        h.register_hook(lambda g: call(site, values, g))

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        h: Tensor = args[0]
        values = h.detach()
        if on_activation is not None:
            on_activation(site, values)
        if on_gradient is None:
            return None
        if not h.requires_grad:
            h = values.requires_grad_()
            values = h.detach()
        watch(h, values, on_gradient)
        return (h, *args[1:])

    return hook
