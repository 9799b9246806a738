"""Find FFNs by what they compute, not by what they are called.

One short forward is cut at every projection: each output is replaced by random numbers that start a new autograd
graph. What a projection D reads is then a function of the outputs of a few others, and its Jacobian tells whether D
is the down projection of an FFN. It is, when its input is

* position-wise and channel-diagonal in the outputs of its producers (this rejects attention and norms),
* not linear in its producers together (this rejects low-rank pairs and sums),
* a function of those outputs alone (this rejects products with other inputs of the layer): the first two tokens and
  the last get the same random numbers, so it must agree there,
* the only use of those outputs (this rejects everything on the residual stream).

Weights of projections do not enter, so zeros or NaN in them do not matter; those of a streamed model are not read. The
forward runs outside any ``no_grad`` or ``inference_mode`` of the caller, and of the model's own code.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.ffn.inner_norm import is_rms_norm
from ffnscope.ffn.jacobian import Kind, Refusal, classify
from ffnscope.ffn.offload import set_requires_grad
from ffnscope.ffn.projection import in_width, is_projection, out_width
from ffnscope.ffn.unread import unread_projections
from ffnscope.types import Fused


@dataclass(frozen=True, slots=True)
class Found:
    """One FFN as the probe sees it: names of gate (or None), up and down; ``fused`` when gate and up are one.

    ``norm`` stands before down, and the outputs of ``adapters`` are added to those of gate or up. A forward runs it
    ``runs`` times.
    """

    layer: str
    gate: str | None
    up: str
    down: str
    fused: Fused | None
    norm: str | None = None
    adapters: tuple[str, ...] = ()
    runs: int = 1


@dataclass(frozen=True, slots=True)
class Probed:
    """What a probe saw.

    Attributes:
        ffns: the FFNs, in the order of the model.
        misses: what is built like a down projection but cannot be cut: its name and why.
        ran: every projection that took part.
    """

    ffns: tuple[Found, ...]
    misses: dict[str, str]
    ran: frozenset[str]


@dataclass(slots=True)
class _Trace:
    """Per layer path: projection -> what it read, and projection -> the random output it was given.

    Per path of a norm in a layer: what it was given, and what it gave. How often each projection ran.
    """

    reads: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    writes: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])
    runs: Counter[str] = field(default_factory=Counter[str])


def layer_path(name: str) -> str | None:
    """Path of the layer that a module belongs to: everything up to the first integer part."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return None


def probe(model: nn.Module, input_ids: Tensor) -> Probed:
    """Run the probe on ``input_ids`` [1, T], T >= 4 ([codebooks, T] for a model with several)."""
    trace = _Trace()
    found: list[Found] = []
    misses: dict[str, str] = {}
    with torch.inference_mode(False), torch.enable_grad():
        with unread_projections(model), _cut(model, trace):
            model(input_ids=input_ids, use_cache=False)
        for layer, reads in trace.reads.items():
            for down, ffn in _ffns_of_layer(model, layer, reads, trace):
                if isinstance(ffn, Found):
                    found.append(replace(ffn, runs=trace.runs[down]))
                else:
                    misses[down] = ffn
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    ran = frozenset(name for writes in trace.writes.values() for name in writes)
    return Probed(tuple(sorted(found, key=lambda f: order[f.down])), misses, ran)


@contextlib.contextmanager
def _cut(model: nn.Module, trace: _Trace) -> Generator[None]:
    random = torch.Generator().manual_seed(0)
    handles: list[Any] = []
    names = {name: layer_path(name) for name, module in model.named_modules() if is_projection(module)}
    last = list(dict.fromkeys(p for p in names.values() if p is not None))[-1:]
    # by name: a forward replaces the parameters that are offloaded
    grads = [(m, n, p.requires_grad) for m in model.modules() for n, p in m.named_parameters(recurse=False)]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for module, name, _ in grads:
            set_requires_grad(module, name, flag=False)
        for name, layer in names.items():
            # a projection outside the layers (the LM head) reads the last layer's output
            where = layer or (last[0] if last else "")
            handles.append(model.get_submodule(name).register_forward_hook(_replacer(trace, where, name, random)))
        for name, module in model.named_modules():
            if layer_path(name) and _is_norm(module):
                handles.append(module.register_forward_hook(_norm_keeper(trace, name)))
        for layer in dict.fromkeys(p for p in names.values() if p is not None):
            block = model.get_submodule(layer)
            handles.append(block.register_forward_pre_hook(_detach_inputs, with_kwargs=True))
            handles.append(block.register_forward_hook(_keeper(trace, layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, name, flag in grads:
            set_requires_grad(module, name, flag)
        for module, mode in modes:
            module.training = mode


def _replacer(trace: _Trace, layer: str, name: str, random: torch.Generator) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        if not isinstance(output, Tensor):
            return None  # routers that are linear modules and return a choice
        torch.set_grad_enabled(True)  # reversible layers run without gradients
        trace.runs[name] += 1
        noise = torch.randn(output.shape, generator=random).to(output)
        tokens = noise.view(-1, output.shape[-1])
        tokens[1:2] = tokens[-1:] = tokens[:1]
        noise.requires_grad_()
        reads, writes = trace.reads.setdefault(layer, {}), trace.writes.setdefault(layer, {})
        if name not in reads and args:
            reads[name] = args[0]
            writes[name] = noise
        return noise.clone()  # a copy: some layers add a bias to the output in place

    return hook


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.lower()
    return named and isinstance(weight, Tensor) and weight.dim() == 1 and next(module.children(), None) is None


def _norm_keeper(trace: _Trace, name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if name not in trace.norms and args and isinstance(output, Tensor):
            trace.norms[name] = args[0], output

    return hook


def _keeper(trace: _Trace, layer: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, Tensor):
            trace.reads.setdefault(layer, {})[""] = tensor  # "" = the residual stream
            trace.writes.setdefault(layer, {})

    return hook


def _detach_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give every layer a graph of its own; else each derivative would walk through all layers before it."""

    def cut(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    return tuple(cut(a) for a in args), {k: cut(v) for k, v in kwargs.items()}


def _ffns_of_layer(
    model: nn.Module, layer: str, reads: dict[str, Tensor], trace: _Trace
) -> Iterator[tuple[str, Found | str]]:
    """Yield the down projections of a layer, each with its FFN or the reason why it cannot be cut."""
    writes = trace.writes[layer]
    producers = {name: _producers(x, writes) for name, x in reads.items()}
    uses = [p for names in producers.values() for p in names]
    for down, names in producers.items():
        if not down or layer_path(down) is None or not names or any(uses.count(n) > 1 for n in names):
            continue
        d_model = out_width(model.get_submodule(down))
        x, outputs = reads[down], {n: writes[n] for n in names}
        others = [n for n in names if in_width(model.get_submodule(n)) != d_model]
        if len(others) == len(names):
            continue
        kind = classify(x, list(outputs.values()))
        if kind is None:
            continue
        if others:
            yield down, _with_adapters(layer, down, x, outputs, others)
        elif isinstance(kind, Kind):
            yield down, _named(layer, down, names, kind)
        elif kind is Refusal.PRODUCERS:
            yield down, f"more than two projections make its channels: {', '.join(names)}"
        elif len(names) > 1 or x.shape[-1] >= d_model:  # else a low-rank pair with a norm between
            found = _behind_norm(model, layer, down, x, outputs, trace)
            yield down, found or _why_not_independent(model, down, x.shape[-1])


def _with_adapters(layer: str, down: str, x: Tensor, outputs: dict[str, Tensor], adapters: list[str]) -> Found | str:
    """An FFN to whose gate or up low-rank matrices add: x must change with their outputs as with those."""
    names = [n for n in outputs if n not in adapters]
    kind = classify(x, [outputs[n] for n in names])
    slopes = dict(
        zip(outputs, torch.autograd.grad(_weighted(x), list(outputs.values()), retain_graph=True), strict=True)
    )
    added = all(any(torch.equal(slopes[a], slopes[n]) for n in names) for a in adapters)
    if isinstance(kind, Kind) and added:
        return replace(_named(layer, down, names, kind), adapters=tuple(adapters))
    return f"{', '.join(adapters)} (an adapter) changes its gate or up projection in another way than by adding to it"


def _behind_norm(
    model: nn.Module, layer: str, down: str, x: Tensor, outputs: dict[str, Tensor], trace: _Trace
) -> Found | None:
    """A gated FFN with an RMS norm over its channels, whose weights can make up for those that are removed."""
    for name, (given, normed) in trace.norms.items():
        if normed.shape != x.shape or not name.startswith(f"{layer}.") or not torch.equal(normed, x):
            continue
        kind = classify(given, list(outputs.values()))
        if not isinstance(kind, Kind) or kind.gate is None:  # h without gate and up need not be zero
            continue
        if is_rms_norm(model.get_submodule(name), x.shape[-1]):
            return replace(_named(layer, down, list(outputs), kind), norm=name)
    return None


def _named(layer: str, down: str, names: list[str], kind: Kind) -> Found:
    if kind.gate is None:
        return Found(layer, None, names[0], down, None)
    if kind.fused is not None:
        return Found(layer, names[0], names[0], down, kind.fused)
    return Found(layer, names[kind.gate], names[1 - kind.gate], down, None)


def _why_not_independent(model: nn.Module, down: str, d_ff: int) -> str:
    parent = down.rpartition(".")[0]
    for name, module in model.get_submodule(parent).named_modules(prefix=parent):
        if "norm" in type(module).__name__.lower() and any(tuple(p.shape) == (d_ff,) for p in module.parameters()):
            return f"a norm over all its channels ({name}) stands before it, so removing one changes the others"
    return "its channels do not each depend on one output of gate and up alone, so none can be removed by itself"


def _producers(x: Tensor, writes: dict[str, Tensor]) -> list[str]:
    if not x.requires_grad:
        return []
    grads: Any = torch.autograd.grad(_weighted(x), list(writes.values()), retain_graph=True, allow_unused=True)
    return [name for name, g in zip(writes, grads, strict=True) if g is not None and bool((g != 0).any())]


def _weighted(x: Tensor) -> Tensor:
    """A number that changes with every entry of x, with each in another way."""
    return (x * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)).sum()
