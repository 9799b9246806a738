"""Taps on channel activations: the only place that hooks them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ffnscope.ffn.offload import set_requires_grad
from ffnscope.ffn.projection import down_projection, projection
from ffnscope.types import FFNSite

OnActivation = Callable[[FFNSite, Tensor], None]
OnGradient = Callable[[FFNSite, Tensor, Tensor], None]
OnSignal = Callable[[FFNSite, str, Tensor], None]


@dataclass(frozen=True, slots=True)
class SignalTap:
    """Also call back with the FFN's input "x", its output "y", or the gradient "dy" of its output, as named."""

    call: OnSignal
    names: tuple[str, ...]


@contextlib.contextmanager
def channel_taps(
    model: nn.Module,
    sites: Sequence[FFNSite],
    on_activation: OnActivation | None,
    on_gradient: OnGradient | None = None,
    signal_tap: SignalTap | None = None,
) -> Generator[None]:
    """Call back with h [batch, T, d_ff] in the forward, and with h and its gradient in the backward.

    A model that flattens tokens before its FFN (OPT) gives [batch * T, d_ff]. h and g are views: do not change them.
    ``signal_tap`` also brings x, y [batch, T, d_model] in the forward and dy, before g, in the backward.

    When gradients are wanted and nothing before a site needs one (weights are frozen), its h starts the autograd
    graph: the backward ends at the first tapped site. All hooks are removed on exit, also after an exception.
    """
    handles: list[Any] = []
    try:
        for site in sites:
            down = down_projection(model, site)
            hook = _forward_hook(site, on_activation, on_gradient)
            handles.append(down.register_forward_pre_hook(hook))
            if signal_tap is not None and "x" in signal_tap.names:
                up = projection(model, site, site.up)
                handles.append(up.register_forward_pre_hook(_input_hook(site, signal_tap)))
            if signal_tap is not None and {"y", "dy"} & set(signal_tap.names):
                handles.append(down.register_forward_hook(_output_hook(site, signal_tap)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Generator[None]:
    """Put the model in eval mode without weight gradients; restore both on exit."""
    # by name: a forward replaces the parameters that are offloaded
    flags = [(m, n, p.requires_grad) for m in model.modules() for n, p in m.named_parameters(recurse=False)]
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for module, name, _ in flags:
            set_requires_grad(module, name, flag=False)
        yield
    finally:
        for module, name, flag in flags:
            set_requires_grad(module, name, flag)
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
            h = h.detach().requires_grad_()  # not values, which the callback may keep
        watch(h, values, on_gradient)
        return (h, *args[1:])

    return hook


def _input_hook(site: FFNSite, tap: SignalTap) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        tap.call(site, "x", args[0].detach())

    return hook


def _output_hook(site: FFNSite, tap: SignalTap) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if "y" in tap.names:
            tap.call(site, "y", output.detach())
        if "dy" in tap.names and output.requires_grad:
            output.register_hook(lambda dy: tap.call(site, "dy", dy))

    return hook
