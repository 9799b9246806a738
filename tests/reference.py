"""Calibration done the slow way: one window at a time, full autograd, every sum written out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.calibrate.collect import PassOptions, calibrate, join_statistics
from ffnscope.calibrate.windows import Windows, contiguous_windows
from ffnscope.registry import METRICS
from ffnscope.types import ChannelStats, FFNSite
from tiny import HIDDEN, tiny, tokens

CORE = torch.tensor([3, 11, 40])


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


def slow_signals(model: Any, sites: list[FFNSite], row: Windows) -> dict[FFNSite, dict[str, Tensor]]:
    """x, h, y, dy, g of one window, one row per token: dy and g by autograd of its summed NLL through all weights."""
    seen: dict[FFNSite, dict[str, Tensor]] = {s: {} for s in sites}
    values: dict[FFNSite, dict[str, Tensor]] = {s: {} for s in sites}

    def keep(site: FFNSite, name: str, tensor: Tensor) -> None:
        seen[site][name] = tensor
        values[site][name] = tensor.detach().clone().flatten(0, -2)  # before the model adds to it in place

    handles: list[Any] = []
    for site in sites:
        up, down = (model.get_submodule(site.projections[i]) for i in (-2, -1))
        handles += [
            up.register_forward_pre_hook(lambda module, args, site=site: keep(site, "x", args[0])),
            down.register_forward_pre_hook(lambda module, args, site=site: keep(site, "h", args[0])),
            down.register_forward_hook(lambda module, args, out, site=site: keep(site, "y", out)),
        ]
    logits = model(input_ids=row.input_ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    nll = torch.zeros((), dtype=logits.dtype)
    for t in range(1, row.length):
        if row.targets[0, t]:
            nll = nll - logits[0, t - 1].log_softmax(-1)[row.input_ids[0, t]]
    for name, of in (("g", "h"), ("dy", "y")):
        grads = torch.autograd.grad(nll, [seen[s][of] for s in sites], retain_graph=True)
        for site, grad in zip(sites, grads, strict=True):
            values[site][name] = grad.detach().flatten(0, -2)
    return values


def slow_signals_of_all(model: Any, sites: list[FFNSite], windows: Windows) -> dict[FFNSite, dict[str, Tensor]]:
    """The signals of all windows, one below the other."""
    rows = [slow_signals(model, sites, row) for row in singles(windows)]
    return {s: {name: torch.cat([r[s][name] for r in rows]) for name in rows[0][s]} for s in sites}


def slow_means(
    model: Any, sites: list[FFNSite], windows: Windows, core: Mapping[FFNSite, Tensor]
) -> dict[FFNSite, dict[str, Tensor]]:
    """The mean of every statistic but the histogram, over all windows."""
    n, n_targets = windows.n_tokens, windows.n_targets
    found: dict[FFNSite, dict[str, Tensor]] = {}
    for site, signals in slow_signals_of_all(model, sites, windows).items():
        x, h, g, dy = (signals[name] for name in ("x", "h", "g", "dy"))
        q = h * g
        found[site] = {
            "act_sum": h.sum(0) / n,
            "act_abs": h.abs().sum(0) / n,
            "act_sq": (h * h).sum(0) / n,
            "act_window_sq": sum(w.abs().mean(0) ** 2 for w in h.split(windows.valid.sum(1).tolist())) / n,
            "grad_sq": (g * g).sum(0) / n_targets,
            "taylor_abs": q.abs().sum(0) / n_targets,
            "taylor_sq": (q * q).sum(0) / n_targets,
            "taylor_sum": q.sum(0) / n_targets,
            "taylor_core": sum(torch.outer(row[core[site]], row) for row in q) / n_targets,
            "x_sum": x.sum(0) / n,
            "ffn_in_sq": (x * x).sum(0) / n,
            "ffn_out_sq": (signals["y"] * signals["y"]).sum(0) / n,
            "x_sq": (x * x).sum(0) / n,
            "y_sq": (signals["y"] * signals["y"]).sum(0) / n,
            "x_outer": sum(torch.outer(row, row) for row in x) / n,
            "xh_outer": sum(torch.outer(*rows) for rows in zip(x, h, strict=True)) / n,
            "h_outer": sum(torch.outer(row, row) for row in h) / n,
            "dy_outer": sum(torch.outer(row, row) for row in dy) / n_targets,
        }
    return found


def of_ffns(found: dict[FFNSite, ChannelStats]) -> dict[FFNSite, ChannelStats]:
    """Without the parts of the model that are observed for its graph."""
    return {site: stats for site, stats in found.items() if site.role == "ffn"}


def some_core(sites: list[FFNSite]) -> dict[FFNSite, Tensor]:
    """`CORE` in every site."""
    return dict.fromkeys(sites, CORE)


def calibrate_in_two(
    model: Any, windows: Windows, core: Mapping[FFNSite, Tensor], **changes: Any
) -> dict[FFNSite, ChannelStats]:
    """Every statistic: those that need no core, and those that do; ``changes`` are pass options."""
    options = PassOptions(**changes)
    passes = [
        calibrate(model, windows, METRICS.names(), sites=list(core), core=c, options=options) for c in (None, core)
    ]
    return join_statistics(*passes)
