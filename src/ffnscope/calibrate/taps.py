"""Taps on channel activations, and on the residual stream that they read and write: the only place that hooks them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ffnscope.ffn.expert_calls import Call, Experts, Part, expert_calls, group_experts
from ffnscope.ffn.expert_lists import routed_tokens
from ffnscope.ffn.projection import channel_readers, down_projection, projection, uses_of
from ffnscope.types import FFNSite

OnActivation = Callable[[FFNSite, Tensor], None]
OnGradient = Callable[[FFNSite, Tensor, Tensor], None]
OnSignal = Callable[[FFNSite, str, Tensor], None]
OnRouting = Callable[[FFNSite, Tensor], None]


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
    on_routing: OnRouting | None = None,
) -> Generator[None]:
    """Call back with h [batch, T, d_ff] in the forward, and with h and its gradient in the backward.

    A model that flattens tokens before its FFN (OPT) gives [batch * T, d_ff]. h and g are views: do not change them.
    ``signal_tap`` also brings x, y [batch, T, d_model] in the forward and dy, before g, in the backward.

    An expert gives only the n tokens that are routed to it, h [n, d_ff]; ``on_routing`` is called before with their
    indices [n] in batch * T. It is called for no expert without tokens. Its y is the product with down alone, before
    bias and router weight.

    An FFN that several layers share calls back once for each of them, in the order in which they run. Where a norm
    stands before the down projection, h is what the norm is given.

    When gradients are wanted and nothing before a site needs one (weights are frozen), its h starts the autograd
    graph: the backward ends at the first tapped site. A cut of the residual stream starts none. All hooks are removed
    on exit, also after an exception.

    Raises:
        LayoutError: inside the block, when it cannot be told which tokens an expert is given.
    """
    handles: list[Any] = []
    groups = group_experts(sites)
    tap = _ExpertTap(groups, on_activation, on_gradient, signal_tap, on_routing)
    routed = contextlib.nullcontext() if on_routing is None else routed_tokens(model, sites, on_routing)
    try:
        with routed, expert_calls(model, list(groups), tap):
            for site in sites:  # after the hooks of the routing, which tell the tokens of all signals
                if not site.stacked:
                    _hook_dense(model, site, handles, _forward_hook(site, on_activation, on_gradient), signal_tap)
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def input_taps(model: nn.Module, paths: Sequence[str], call: Callable[[str, Tensor], None]) -> Generator[None]:
    """Call back with the path and the input of these projections, whatever they belong to, whenever one runs.

    The input is a view: do not change it. All hooks are removed on exit, also after an exception.
    """
    handles: list[Any] = []

    def hook(path: str) -> Any:
        return lambda module, args: call(path, args[0].detach())

    try:
        handles += [model.get_submodule(path).register_forward_pre_hook(hook(path)) for path in paths]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook_dense(model: nn.Module, site: FFNSite, handles: list[Any], hook: Any, signal_tap: SignalTap | None) -> None:
    handles += [reader.register_forward_pre_hook(hook) for reader in channel_readers(model, site)]
    if signal_tap is None or site.role not in ("ffn", "attention"):
        return
    for use in uses_of(site):
        if "x" in signal_tap.names:
            up = projection(model, use, use.up)
            handles.append(up.register_forward_pre_hook(_input_hook(site, signal_tap)))
        if {"y", "dy"} & set(signal_tap.names):
            handles.append(down_projection(model, use).register_forward_hook(_output_hook(site, signal_tap)))


@dataclass(frozen=True, slots=True, eq=False)
class _ExpertTap:
    """Observer of the products of fused experts."""

    groups: Mapping[Experts, Mapping[int, FFNSite]]
    on_activation: OnActivation | None
    on_gradient: OnGradient | None
    signal_tap: SignalTap | None
    on_routing: OnRouting | None

    def __call__(self, call: Call, run: Callable[[Tensor], Tensor]) -> Tensor:
        sites = self.groups[call.experts]
        parts = [(sites[p.expert], p) for p in call.parts if p.expert in sites and p.tokens.numel()]
        if not call.is_down:
            if call.name == call.experts.producers[0]:
                self._begin(call, parts)
            return run(call.x)
        h = call.x
        for site, part in parts:
            if self.on_activation is not None:
                self.on_activation(site, part.rows(h.detach()))
        if self.on_gradient is not None and parts:
            h = h if h.requires_grad else h.detach().requires_grad_()
            _on_gradient_rows(h, parts, self.on_gradient)
        out = run(h)
        if self.signal_tap is not None:
            self._end(out, parts, self.signal_tap)
        return out

    def _begin(self, call: Call, parts: Sequence[tuple[FFNSite, Part]]) -> None:
        for site, part in parts:
            if self.on_routing is not None:
                self.on_routing(site, part.tokens)
            if self.signal_tap is not None and "x" in self.signal_tap.names:
                self.signal_tap.call(site, "x", part.rows(call.x.detach()))

    def _end(self, out: Tensor, parts: Sequence[tuple[FFNSite, Part]], tap: SignalTap) -> None:
        for site, part in parts:
            if "y" in tap.names:
                tap.call(site, "y", part.rows(out.detach()))
        if "dy" in tap.names and out.requires_grad:

            def hook(dy: Tensor) -> None:
                for site, part in parts:
                    tap.call(site, "dy", part.rows(dy))

            out.register_hook(hook)


def _on_gradient_rows(h: Tensor, parts: Sequence[tuple[FFNSite, Part]], call: OnGradient) -> None:
    values = h.detach()  # holding h itself would be a reference cycle

    def hook(g: Tensor) -> None:
        for site, part in parts:
            call(site, part.rows(values), part.rows(g))

    h.register_hook(hook)


def _forward_hook(site: FFNSite, on_activation: OnActivation | None, on_gradient: OnGradient | None) -> Any:
    def watch(h: Tensor, values: Tensor, call: OnGradient) -> None:
        # the closure holds the detached values: holding h itself would be a reference cycle
        h.register_hook(lambda g: call(site, values, g))

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        h: Tensor = args[0]
        if not h.numel():  # an expert without tokens
            return None
        values = h.detach()
        if on_activation is not None:
            on_activation(site, values)
        if on_gradient is None or (site.role == "cut" and not h.requires_grad):
            return None
        if not h.requires_grad:
            h = h.detach().requires_grad_()  # not values, which the callback may keep
        watch(h, values, on_gradient)
        return (h, *args[1:])

    return hook


def _input_hook(site: FFNSite, tap: SignalTap) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].numel():
            tap.call(site, "x", args[0].detach())

    return hook


def _output_hook(site: FFNSite, tap: SignalTap) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not output.numel():
            return
        if "y" in tap.names:
            tap.call(site, "y", output.detach())
        if "dy" in tap.names and output.requires_grad:
            output.register_hook(lambda dy: tap.call(site, "dy", dy))

    return hook
