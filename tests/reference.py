"""Calibration done the slow way: one window at a time, full autograd, every sum written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.calibrate.windows import Windows, contiguous_windows
from ffnscope.types import FFNSite
from tiny import HIDDEN, tiny, tokens


def exact(arch: str, **changes: Any) -> Any:
    """A tiny float64 model whose norms are computed in float64 too (those of `transformers` go through float32)."""
    model = tiny(arch, dtype=torch.float64, **changes)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.RMSNorm(HIDDEN, 1e-6, dtype=torch.float64))
    return model


def text(rows: int = 8, length: int = 16, seed: int = 0) -> Windows:
    """Windows of random tokens without padding."""
    return contiguous_windows(tokens(rows, length, seed), "random tokens")


def padded(lengths: list[int], width: int = 16, seed: int = 0) -> Windows:
    """One window per length, right-padded to ``width`` with token 0."""
    ids = tokens(len(lengths), width, seed)
    valid = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    targets = valid.clone()
    targets[:, 0] = False
    return Windows(ids * valid, valid, targets, torch.arange(len(lengths)), "random tokens")


def singles(windows: Windows) -> list[Windows]:
    """Every window alone, without its padding."""
    rows = [windows[i : i + 1] for i in range(len(windows))]
    return [row.cut(int(row.valid.sum())) for row in rows]


def slow_signals(model: Any, sites: list[FFNSite], row: Windows) -> dict[FFNSite, tuple[Tensor, Tensor]]:
    """h and g [T, d_ff] of one window: g by autograd.grad of its summed NLL, with a graph through all weights."""
    seen: dict[FFNSite, Tensor] = {}

    def keep(site: FFNSite) -> Any:
        return lambda module, args: seen.__setitem__(site, args[0])

    downs = {s: model.get_submodule(s.projections[-1]) for s in sites}
    handles = [module.register_forward_pre_hook(keep(site)) for site, module in downs.items()]
    logits = model(input_ids=row.input_ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    nll = torch.zeros((), dtype=logits.dtype)
    for t in range(1, row.length):
        if row.targets[0, t]:
            nll = nll - logits[0, t - 1].log_softmax(-1)[row.input_ids[0, t]]
    grads = torch.autograd.grad(nll, [seen[s] for s in sites])
    return {s: (seen[s].detach().flatten(0, -2), g.flatten(0, -2)) for s, g in zip(sites, grads, strict=True)}


def slow_means(model: Any, sites: list[FFNSite], windows: Windows) -> dict[FFNSite, dict[str, Tensor]]:
    """The mean of every statistic, over all windows."""
    rows = singles(windows)
    signals = [slow_signals(model, sites, row) for row in rows]
    n, n_targets = sum(r.n_tokens for r in rows), sum(r.n_targets for r in rows)
    found: dict[FFNSite, dict[str, Tensor]] = {}
    for site in sites:
        h = torch.cat([s[site][0] for s in signals])
        g = torch.cat([s[site][1] for s in signals])
        found[site] = {
            "act_sum": h.sum(0) / n,
            "act_abs": h.abs().sum(0) / n,
            "act_sq": (h * h).sum(0) / n,
            "grad_sq": (g * g).sum(0) / n_targets,
            "taylor_abs": (h * g).abs().sum(0) / n_targets,
            "taylor_sq": (h * g * h * g).sum(0) / n_targets,
        }
    return found
