"""Experts done the slow way: one token and one expert at a time, with the weights of each family written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffnscope.calibrate.windows import Windows
from reference import singles
from tiny_moe import EXPERT, N_EXPERTS, TOP_K

Key = tuple[str, int]
"""Path of the experts, and index of one."""


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """One token in one expert: where it is in its window, input [d_model], channels [d_ff] and output [d_model]."""

    position: int
    x: Tensor
    h: Tensor
    y: Tensor


def expert_paths(name: str, model: Any) -> list[str]:
    """Modules that are given the tokens of routed experts."""
    last = {"jetmoe": "mlp", "llama4_text": "feed_forward.experts", "dbrx": "ffn.experts"}
    last |= {"nemotron_h": "mixer.experts", "granitemoe": "block_sparse_moe.experts"}
    return [path for path, _ in model.named_modules() if path.endswith("." + last.get(name, "mlp.experts"))]


def channels(name: str, module: Any, expert: int, x: Tensor) -> Tensor:
    """Channels [d_ff] of one token [d_model]."""
    if name == "nemotron_h":
        return module.act_fn(module.up_proj[expert] @ x)
    if name == "gpt_oss":
        both = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
        gate, up = both[0::2].clamp(max=module.limit), both[1::2].clamp(-module.limit, module.limit)
        return (up + 1) * gate * torch.sigmoid(gate * module.alpha)
    if name == "dbrx":
        gate, up = (w.view(N_EXPERTS, EXPERT, -1)[expert] @ x for w in (module.mlp.w1, module.mlp.v1))
        return module.mlp.activation_fn(gate) * up
    if name in ("aria_text", "llama4_text"):
        both = x @ module.gate_up_proj[expert]
    else:
        both = (module.input_linear.weight if name == "jetmoe" else module.gate_up_proj)[expert] @ x
    act = module.activation if name == "jetmoe" else module.act_fn
    return act(both[:EXPERT]) * both[EXPERT:]


def output(name: str, module: Any, expert: int, h: Tensor) -> Tensor:
    """What one expert makes of the channels [d_ff] of a token, [d_model]."""
    if name == "gpt_oss":
        return h @ module.down_proj[expert] + module.down_proj_bias[expert]
    if name == "dbrx":
        return h @ module.mlp.w2.view(N_EXPERTS, EXPERT, -1)[expert]
    if name in ("aria_text", "llama4_text"):
        return h @ module.down_proj[expert]
    return (module.output_linear.weight if name == "jetmoe" else module.down_proj)[expert] @ h


def routing(name: str, module: Any, args: tuple[Any, ...]) -> Iterator[tuple[int, int, Tensor, Any]]:
    """(token, expert, x, weight of the output) of everything that is routed."""
    if name == "llama4_text":  # scaled inputs of all tokens for all experts, zero where a token is not routed
        for e, rows in enumerate(args[0].view(N_EXPERTS, -1, args[0].shape[-1])):
            yield from ((t, e, x, 1.0) for t, x in enumerate(rows) if bool((x != 0).any()))
        return
    flat = args[0].reshape(-1, args[0].shape[-1])
    if name == "jetmoe":
        best = module.router.layer(flat).float().topk(TOP_K, dim=-1)
        index, weights = best.indices, best.values.softmax(-1).to(flat.dtype)
    else:
        index, weights = args[1:]
    for t, row in enumerate(flat):
        yield from ((t, int(e), row, w) for e, w in zip(index[t], weights[t], strict=True))


def slow_forward(name: str, path: str, module: Any, seen: dict[Key, list[Seen]]) -> Any:
    """A forward that does what the module does, token by token, and keeps x, h and y in ``seen``."""

    def forward(*args: Any) -> Tensor:
        flat = args[0].reshape(-1, args[0].shape[-1])
        out = [torch.zeros_like(row) for row in flat]
        n = len(flat) // N_EXPERTS
        for t, e, x, weight in routing(name, module, args):
            if e >= N_EXPERTS:  # an expert without weights
                out[t] = out[t] + x * weight
                continue
            h = channels(name, module, e, x)
            y = output(name, module, e, h)
            seen.setdefault((path, e), []).append(Seen(t, x.detach(), h, y))
            place = e * n + t if name == "llama4_text" else t
            out[place] = out[place] + y * weight
        total = torch.stack(out).view(args[0].shape)
        return total + module.bias if name == "jetmoe" else total

    return forward


def slow_rows(name: str, model: Any, windows: Windows) -> dict[Key, dict[str, Tensor]]:
    """x, h, g, dy [n, ..] of every token in every expert, with its window, position, and whether it predicts one.

    The model is changed for good: its experts run slowly from now on.
    """
    found: dict[Key, list[dict[str, Any]]] = {}
    seen: dict[Key, list[Seen]] = {}
    for path in expert_paths(name, model):
        module = model.get_submodule(path)
        module.forward = slow_forward(name, path, module, seen)
    for window, row in enumerate(singles(windows)):
        seen.clear()
        logits = model(input_ids=row.input_ids, use_cache=False).logits
        nll = torch.zeros((), dtype=logits.dtype)
        for t in torch.nonzero(row.targets[0]).flatten().tolist():
            nll = nll - logits[0, t - 1].log_softmax(-1)[row.input_ids[0, t]]
        flat = [(key, one) for key, tokens in seen.items() for one in tokens]
        of = [*(one.h for _, one in flat), *(one.y for _, one in flat)]
        grads = torch.autograd.grad(nll, of, allow_unused=True, materialize_grads=True)
        for (key, one), g, dy in zip(flat, grads[: len(flat)], grads[len(flat) :], strict=True):
            t = one.position
            predicts = t + 1 < row.length and bool(row.targets[0, t + 1])
            values = {"x": one.x, "h": one.h.detach(), "g": g, "dy": dy}
            found.setdefault(key, []).append({**values, "window": window, "position": t, "predicts": predicts})
    return {k: {f: torch.stack([torch.as_tensor(r[f]) for r in rows]) for f in rows[0]} for k, rows in found.items()}
