"""Find fused experts: a small table says where their parameters may be, a probe says what they compute.

The probe runs a few tokens through the model. In each table row's experts, the product with gate and up is replaced by
random numbers that start an autograd graph, and the input of down is differentiated by them. So the order of gate and
up, and that channels are independent of each other, is measured; how the parameters are stored is read off the
products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.errors import LayoutError
from ffnscope.ffn.expert_calls import Call, Experts, expert_calls
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.probe import layer_path
from ffnscope.ffn.unread import unread_head
from ffnscope.types import FFNSite, Fused, Storage

# parameters of producers and down, relative to the module that is given the tokens: one row per family of names
FAMILIES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_up_proj",), "down_proj"),
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("mlp.w1", "mlp.v1"), "mlp.w2"),
    (("input_linear.weight",), "output_linear.weight"),
)
TRIALS = 4
_STORAGE: dict[tuple[bool, bool, bool], Storage] = {
    # producer and down sum over their last axis, flat
    (True, True, False): "linear",
    (False, False, False): "transposed",
    (True, False, True): "flat",
}


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the probe found out about one set of fused experts."""

    gate: str | None
    up: str
    fused: Fused | None
    storage: Storage
    d_model: int
    d_ff: int


@dataclass(slots=True, eq=False)
class _Seen:
    """Random outputs of the producers of each expert, and what they tell."""

    outputs: dict[int, dict[str, Tensor]] = field(default_factory=dict[int, dict[str, Tensor]])
    producers_last: bool = True
    layout: _Layout | None = None
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class FoundExperts:
    """Experts in fused parameters: one site each, in the order of the model; and path -> why those cannot be used."""

    sites: tuple[FFNSite, ...]
    refused: Mapping[str, str]


def find_experts(model: nn.Module, input_ids: Tensor, activation: str) -> FoundExperts:
    """Find the routed and shared experts that are kept in fused parameters.

    ``input_ids`` [1, T] are run once, when the model has any; it is left as it was. An expert that they do not reach
    has the layout of its siblings.
    """
    candidates = [e for name, module in model.named_modules() for e in _candidates(name, module)]
    seen: dict[Experts, _Seen] = {}
    prober = _Prober(seen, torch.Generator().manual_seed(0))
    refused: dict[str, str] = {}
    opened: set[Experts] = set()
    watched = expert_calls(model, candidates, prober)
    try:
        with torch.inference_mode(False), torch.enable_grad(), frozen(model), watched as opened:
            if candidates:
                with unread_head(model):
                    model(input_ids=input_ids, use_cache=False)
    except LayoutError as error:
        refused |= {e.path: str(error) for e in candidates}
    sites: list[FFNSite] = []
    # attention may use the same classes in another way: its forward is not run
    for experts in [] if refused else [e for e in candidates if e in opened]:
        why = seen[experts].refused if experts in seen else None
        layout = _layout(model, experts, seen)
        if why is not None:
            refused[experts.path] = why
        elif layout is None:
            where = f"{experts.path}.{experts.down}"
            refused[experts.path] = f"no product of tokens with {where} was seen, so how its channels lie is not known"
        else:
            sites += _sites(model, experts, layout, activation)
    known = {f"{e.path}.{n}" for e in candidates for n in (*e.producers, e.down)}
    refused |= _unknown(model, known)
    for path in dict.fromkeys(s.path for s in sites):
        beside = next((name for name in refused if name.startswith(f"{path}.")), None)
        if beside is not None:  # it may hold channels, which would not be cut with the others
            refused[path] = f"{beside} {refused[beside]}"
    return FoundExperts(tuple(s for s in sites if s.path not in refused), refused)


def _candidates(path: str, module: nn.Module) -> list[Experts]:
    """Table rows that fit the parameters of a module inside the layers; the first one counts."""
    if layer_path(path) is None:
        return []
    parameters = {name: p for name, p in module.named_parameters() if name.count(".") <= 1}
    for producers, down in FAMILIES:
        found = [parameters.get(name) for name in (*producers, down)]
        if all(p is not None and p.dim() == 3 for p in found):
            return [Experts(path, producers, down)]
        flat = getattr(module, "ffn_hidden_size", None)
        if down == "mlp.w2" and isinstance(flat, int) and all(p is not None and p.dim() == 2 for p in found):
            return [Experts(path, producers, down, flat)]
    return []


class _Prober:
    """Observer of the products: replaces what producers give, and classifies the first channels of each module."""

    def __init__(self, seen: dict[Experts, _Seen], random: torch.Generator):
        self.seen = seen
        self.random = random

    def __call__(self, call: Call, run: Callable[[Tensor], Tensor]) -> Tensor:
        state = self.seen.setdefault(call.experts, _Seen())
        key = call.parts[0].expert
        if call.is_down:
            out = run(call.x.detach())
            if state.layout is None and state.refused is None and call.x.numel():
                try:
                    state.layout = _classify(call, state.outputs[key], state.producers_last, out.shape[-1])
                except LayoutError as error:
                    state.refused = str(error)
            return out
        out = run(call.x)
        state.producers_last = call.contracts_last
        noise = torch.randn(out.shape, generator=self.random).to(out).requires_grad_()
        state.outputs.setdefault(key, {})[call.name] = noise
        return noise.clone()


def _classify(call: Call, outputs: Mapping[str, Tensor], producers_last: bool, d_model: int) -> _Layout:
    d_ff = call.x.shape[-1]
    names, values = list(outputs), list(outputs.values())
    storage = _STORAGE.get((producers_last, call.contracts_last, call.experts.d_ff is not None))
    order = _order(call.x, values)
    if storage is None or order is None:
        reason = "are stored in an unknown way" if order else "depend on each other, or on more than gate and up"
        raise LayoutError(f"the channels of {call.experts.path} ({', '.join(names)} -> {call.name}) {reason}")
    if order == "plain":
        return _Layout(None, names[0], None, storage, d_model, d_ff)
    parts = _halves(values, order, d_ff)
    gate = _gate_index(call.x, parts)
    if order == "separate":
        return _Layout(names[gate], names[1 - gate], None, storage, d_model, d_ff)
    if order == "interleaved":
        if gate != 0:
            raise LayoutError(f"{call.experts.path} interleaves up and gate, up first; only gate first is known")
        return _Layout(names[0], names[0], "interleaved", storage, d_model, d_ff)
    return _Layout(names[0], names[0], "gate_up" if gate == 0 else "up_gate", storage, d_model, d_ff)


def _order(h: Tensor, outputs: Sequence[Tensor]) -> str | None:
    """How the outputs of producers belong to the channels of h [.., d_ff]: plain, separate, halves, interleaved."""
    d_ff, widths = h.shape[-1], [o.shape[-1] for o in outputs]
    if any(o.shape[:-1] != h.shape[:-1] for o in outputs) or not h.requires_grad:
        return None
    if widths == [d_ff] or widths == [d_ff, d_ff]:
        order = "plain" if len(widths) == 1 else "separate"
        return order if _is_diagonal(h, outputs, lambda m: m) else None
    if widths != [2 * d_ff]:
        return None
    if _is_diagonal(h, outputs, lambda m: torch.cat([m, m], -1)):
        return "halves"
    return "interleaved" if _is_diagonal(h, outputs, lambda m: m.repeat_interleave(2, -1)) else None


def _is_diagonal(h: Tensor, outputs: Sequence[Tensor], spread: Callable[[Tensor], Tensor]) -> bool:
    """Whether random subsets of h depend on ``spread`` of the same subset of every output, and on nothing else."""
    touched = torch.zeros(len(outputs))
    for trial in range(TRIALS):
        mask = (torch.rand(h.shape, generator=torch.Generator().manual_seed(trial)) < 0.5).to(h.device)
        grads = torch.autograd.grad((h * mask).sum(), list(outputs), retain_graph=True)
        for i, grad in enumerate(grads):
            if bool(((grad != 0) & ~spread(mask)).any()):
                return False
            touched[i] += float((grad != 0).any())
    return bool((touched > 0).all())


def _halves(outputs: Sequence[Tensor], order: str, d_ff: int) -> list[tuple[Tensor, slice]]:
    if order == "separate":
        return [(o, slice(None)) for o in outputs]
    cuts = (slice(0, d_ff), slice(d_ff, None)) if order == "halves" else (slice(0, None, 2), slice(1, None, 2))
    return [(outputs[0], cut) for cut in cuts]


def _gate_index(h: Tensor, parts: Sequence[tuple[Tensor, slice]]) -> int:
    """0 or 1: h is curved in gate, linear in up; where neither is curved (ReLU), h is dead where gate is negative."""
    curved, dead = [0.0, 0.0], [0.0, 0.0]
    for i, (output, cut) in enumerate(parts):
        (first,) = torch.autograd.grad(h.sum(), output, create_graph=True)
        slope = first[..., cut]
        dead[i] = float((slope[output[..., cut] < 0] == 0).float().mean())
        if slope.requires_grad:
            second: Any = torch.autograd.grad(slope.sum(), output, retain_graph=True, allow_unused=True)[0]
            curved[i] = 0.0 if second is None else float(second[..., cut].abs().mean())
    first_is_gate = curved[0] >= curved[1] if max(curved) > 0 else dead[0] >= dead[1]
    return 0 if first_is_gate else 1


def _layout(model: nn.Module, experts: Experts, seen: Mapping[Experts, _Seen]) -> _Layout | None:
    """Layout of fused experts; when no token reached any of them, that of others with the same names and shapes."""
    if experts in seen and (own := seen[experts].layout) is not None:
        return own
    shapes = _shapes(model, experts)
    return next((s.layout for e, s in seen.items() if s.layout is not None and _shapes(model, e) == shapes), None)


def _shapes(model: nn.Module, experts: Experts) -> dict[str, torch.Size]:
    module = model.get_submodule(experts.path)
    return {name: module.get_parameter(name).shape for name in (*experts.producers, experts.down)}


def _sites(model: nn.Module, experts: Experts, layout: _Layout, activation: str) -> list[FFNSite]:
    rows = model.get_submodule(experts.path).get_parameter(experts.down).shape[0]
    return [
        FFNSite(
            layer=int((layer_path(experts.path) or "0").rsplit(".", 1)[-1]),
            path=experts.path,
            gate=layout.gate,
            up=layout.up,
            down=experts.down,
            d_model=layout.d_model,
            d_ff=layout.d_ff,
            activation=activation,
            fused=layout.fused,
            expert=expert,
            storage=layout.storage,
        )
        for expert in range(rows // layout.d_ff if layout.storage == "flat" else rows)
    ]


def _unknown(model: nn.Module, known: set[str]) -> dict[str, str]:
    """Experts that no table row names, which would be left out silently, or seen on some tokens only."""
    found = {
        name: f"{tuple(parameter.shape)} is not known to hold channels of experts"
        for name, parameter in model.named_parameters()
        if layer_path(name) is not None and "expert" in name and parameter.dim() == 3 and name not in known
    }
    return found
