"""Find FFNs by what they compute, not by what they are called.

One short forward is cut at every projection: each output is replaced by random numbers that start a new autograd
graph. What a projection D reads is then a function of the outputs of a few others, and its Jacobian tells whether D
is the down projection of an FFN. It is, when its input is

* position-wise and channel-diagonal in the outputs of its producers (this rejects attention and norms),
* not linear in its producers together (this rejects low-rank pairs and sums),
* a function of those outputs alone (this rejects products with other inputs of the layer): the first two tokens get
  the same random numbers, so it must agree there,
* the only use of those outputs (this rejects everything on the residual stream).

Weights are never read, so zero or NaN weights do not matter, and offloaded models work. The forward runs outside any
``no_grad`` or ``inference_mode`` of the caller.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ffnscope.ffn.projection import in_width, is_projection, out_width

TRIALS = 6
Order = Literal["concat", "interleaved"]


@dataclass(frozen=True, slots=True)
class Found:
    """One FFN as the probe sees it: names of gate (or None), up and down; ``fused`` when gate and up are one."""

    layer: str
    gate: str | None
    up: str
    down: str
    fused: Literal["gate_up", "up_gate"] | None


@dataclass(slots=True)
class _Trace:
    """Per layer path: projection -> what it read, and projection -> the random output it was given."""

    reads: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    writes: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])


def layer_path(name: str) -> str | None:
    """Path of the layer that a module belongs to: everything up to the first integer part."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return None


def probe(model: nn.Module, input_ids: Tensor) -> list[Found]:
    """Run the probe on ``input_ids`` [1, T], T >= 4, and return the FFNs in the order of the model."""
    trace = _Trace()
    found: list[Found] = []
    with torch.inference_mode(False), torch.enable_grad():
        with _cut(model, trace):
            model(input_ids=input_ids, use_cache=False)
        for layer, reads in trace.reads.items():
            found += _ffns_of_layer(model, layer, reads, trace.writes[layer])
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda f: order[f.down])


@contextlib.contextmanager
def _cut(model: nn.Module, trace: _Trace) -> Generator[None]:
    random = torch.Generator().manual_seed(0)
    handles: list[Any] = []
    names = {name: layer_path(name) for name, module in model.named_modules() if is_projection(module)}
    last = list(dict.fromkeys(p for p in names.values() if p is not None))[-1:]
    grads = {p: p.requires_grad for p in model.parameters()}
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for parameter in grads:
            parameter.requires_grad_(False)
        for name, layer in names.items():
            # a projection outside the layers (the LM head) reads the last layer's output
            where = layer or (last[0] if last else "")
            handles.append(model.get_submodule(name).register_forward_hook(_replacer(trace, where, name, random)))
        for layer in dict.fromkeys(p for p in names.values() if p is not None):
            block = model.get_submodule(layer)
            handles.append(block.register_forward_pre_hook(_detach_inputs, with_kwargs=True))
            handles.append(block.register_forward_hook(_keeper(trace, layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in grads.items():
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _replacer(trace: _Trace, layer: str, name: str, random: torch.Generator) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor):  # a router that is also a Linear
            return output
        noise = torch.randn(output.shape, generator=random).to(output)
        tokens = noise.view(-1, output.shape[-1])
        tokens[1:2] = tokens[:1]
        noise.requires_grad_()
        reads, writes = trace.reads.setdefault(layer, {}), trace.writes.setdefault(layer, {})
        if name not in reads and args:
            reads[name] = args[0]
            writes[name] = noise
        return noise.clone()  # a copy: some layers add a bias to the output in place

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


def _ffns_of_layer(model: nn.Module, layer: str, reads: dict[str, Tensor], writes: dict[str, Tensor]) -> list[Found]:
    producers = {name: _producers(x, writes) for name, x in reads.items()}
    uses = [p for names in producers.values() for p in names]
    found: list[Found] = []
    for down, names in producers.items():
        if not down or layer_path(down) is None or not 1 <= len(names) <= 2 or any(uses.count(n) > 1 for n in names):
            continue
        d_model = out_width(model.get_submodule(down))
        if any(in_width(model.get_submodule(n)) != d_model for n in names):
            continue
        ffn = _classify(layer, down, reads[down], {n: writes[n] for n in names})
        if ffn is not None:
            found.append(ffn)
    return found


def _producers(x: Tensor, writes: dict[str, Tensor]) -> list[str]:
    if not x.requires_grad:
        return []
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    total = (x * weight).sum()
    grads: Any = torch.autograd.grad(total, list(writes.values()), retain_graph=True, allow_unused=True)
    return [name for name, g in zip(writes, grads, strict=True) if g is not None and bool((g != 0).any())]


def _classify(layer: str, down: str, x: Tensor, writes: dict[str, Tensor]) -> Found | None:
    d_ff = x.shape[-1]
    names, outputs = list(writes), list(writes.values())
    if any(o.shape[:-1] != x.shape[:-1] for o in outputs):
        return None
    widths = [o.shape[-1] for o in outputs]
    fused = widths == [2 * d_ff]
    if not fused and any(w != d_ff for w in widths):
        return None
    if not _alike(x.flatten(0, -2)[:2]) or not _is_diagonal(x, outputs, halves=2 if fused else 1):
        return None
    halves = (slice(0, d_ff), slice(d_ff, 2 * d_ff))
    factors = _factors(x, [(outputs[0], h) for h in halves] if fused else [(o, slice(None)) for o in outputs])
    if all(_alike(f.derivative.flatten(0, -2)) for f in factors):
        return None  # linear
    if len(factors) == 1:
        return Found(layer, None, names[0], down, None)
    gate = _which_is_gate(factors)
    if fused:
        return Found(layer, names[0], names[0], down, "gate_up" if gate == 0 else "up_gate")
    return Found(layer, names[gate], names[1 - gate], down, None)


@dataclass(frozen=True, slots=True, eq=False)
class _Factor:
    """What x is computed from, with dx/dvalue per element and the mean size of the second derivative."""

    value: Tensor
    derivative: Tensor
    curvature: float


def _factors(x: Tensor, parts: list[tuple[Tensor, slice]]) -> list[_Factor]:
    """Differentiate a channel-diagonal x twice by each part of an output."""
    factors: list[_Factor] = []
    for output, part in parts:
        (first,) = torch.autograd.grad(x.sum(), output, create_graph=True)
        derivative, curvature = first[..., part], 0.0
        if derivative.requires_grad:
            second: Any = torch.autograd.grad(derivative.sum(), output, retain_graph=True, allow_unused=True)[0]
            curvature = 0.0 if second is None else float(second[..., part].abs().mean())
        factors.append(_Factor(output.detach()[..., part], derivative.detach(), curvature))
    return factors


def _is_diagonal(x: Tensor, outputs: list[Tensor], halves: int) -> bool:
    """Whether random subsets of x depend on the same subset of every output, and nearly all of it."""
    touched = [torch.zeros(o.shape[-1], dtype=torch.bool, device=x.device) for o in outputs]
    for trial in range(TRIALS):
        mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(trial)).to(x.device) < 0.5
        grads = torch.autograd.grad((x * mask).sum(), outputs, retain_graph=True)
        allowed = torch.cat([mask] * halves, -1)
        for i, grad in enumerate(grads):
            nonzero = grad != 0
            if bool((nonzero & ~allowed).any()):
                return False
            touched[i] |= nonzero.flatten(0, -2).any(0)
    return all(float(t.float().mean()) > 0.8 for t in touched)


def _alike(tokens: Tensor) -> bool:
    """Whether all rows are the same."""
    return bool(torch.allclose(tokens, tokens[:1].expand_as(tokens)))


def _which_is_gate(factors: list[_Factor]) -> int:
    """0 or 1: x is linear in up and curved in gate; a ReLU gate is not curved, but x is dead where it is negative."""
    first, second = factors
    if first.curvature == second.curvature == 0:
        dead = [float((f.derivative[f.value < 0] == 0).float().mean()) for f in factors]
        return 0 if dead[0] >= dead[1] else 1
    return 0 if first.curvature >= second.curvature else 1
