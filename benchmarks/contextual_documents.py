"""Cells of benchmarks/contextual.py that are about documents: calibrated targets on unseen ones, and certificates."""

from __future__ import annotations

import time

import contextual_table
import torch

from ffnscope.calibrate.corpora import SPLITS, corpus
from ffnscope.calibrate.text import make_windows
from ffnscope.ffn.sites import find_sites
from ffnscope.registry import POLICIES
from ffnscope.sparse.calibration import Target, calibrate_policy, scored
from ffnscope.sparse.choose import spread
from ffnscope.sparse.evaluation import form_losses
from ffnscope.sparse.ffn import ffn_of
from ffnscope.sparse.forms import MaskedForm
from ffnscope.sparse.labels import largest
from ffnscope.sparse.measures import of_mask, truths
from ffnscope.sparse.policies import TopK
from ffnscope.sparse.predictors.low_bit import low_bit
from ffnscope.sparse.selector import Selector
from ffnscope.sparse.tracing import trace

LENGTH = 96
RULES = ("top_k", "threshold", "nucleus")
TARGETS = (0.9, 0.95)
GRID = [round(0.005 * step, 3) for step in range(10, 200)]
COARSE = GRID[::10]
"""Densities at which the error of the output is taken, a product for each."""
LOSS_GRID = [0.2, 0.3, 0.4, 0.5, 0.65, 0.8]
"""Densities at which the whole model runs."""
MOST_DOCUMENTS = 120
"""That the whole model runs on."""


def label(c):
    """Recall is of the 30 % of the channels with the largest contributions."""
    return largest(c, 0.3)


def windows_of(loaded, name: str):
    """One window per document, from its middle."""
    texts = [text for split in SPLITS for _, text in corpus(name, split)]
    middles = [text[text.find("\n", len(text) // 3) + 1 :] for text in texts]
    return make_windows(middles, loaded.tokenizer, n=None, length=LENGTH, mode="lines")


def traced(loaded, name: str, layers, work):
    """The inputs of the layers asked."""
    windows = windows_of(loaded, name)
    sites = [site for site in find_sites(loaded.model) if site.layer in layers]
    folder = work / f"documents_{name}_{'_'.join(map(str, layers))}_{windows.hash[:12]}"
    return trace(loaded.model, windows, folder, sites=sites)


def measure(args, loaded, add) -> None:
    traces = {name: traced(loaded, name, args.layers, args.work) for name in args.domains}
    done = {(c["domain"], tuple(c["layers"]), c.get("measure")) for c in contextual_table.read(args.part)}
    for name in args.domains:
        for measure in [None] if args.part == "targets" else [*MISSES, "relative_error"]:
            if (name, tuple(args.layers), measure) in done:
                continue
            start = time.perf_counter()
            if measure is None:
                found = targets(loaded.model, name, traces)
            else:
                found = {"measure": measure, **certificates(loaded.model, traces[name], measure)}
            seconds = round(time.perf_counter() - start, 1)
            add({"part": args.part, "domain": name, "layers": args.layers, **found, "seconds": seconds})


def measure_losses(args, loaded, add) -> None:
    """Cells of the rise of the loss of every document, nats per token: top-k by 4 bits in all FFNs."""
    sites = find_sites(loaded.model)
    done = {c["domain"] for c in contextual_table.read("certificates") if c.get("measure") == "perplexity"}
    for name in args.domains:
        if name in done:
            continue
        start, windows = time.perf_counter(), windows_of(loaded, name)
        found = losses(loaded.model, sites, spread(windows, MOST_DOCUMENTS))
        cell = {"part": "certificates", "domain": name, "layers": sorted({site.layer for site in sites})}
        add({**cell, "measure": "perplexity", **found, "seconds": round(time.perf_counter() - start, 1)})


def losses(model, sites, windows) -> dict:
    proxies = {site: low_bit(ffn_of(model, site), group=64) for site in sites}
    counts = windows.targets.sum(1)
    dense = form_losses(model, None, windows, batch_size=4).nll
    rows = []
    for density in LOSS_GRID:
        selectors = {site: Selector(one, TopK(), int(density * site.d_ff)) for site, one in proxies.items()}
        nll = form_losses(model, MaskedForm("top-k", selectors), windows, batch_size=4).nll
        rows.append(rounded((nll - dense) / counts))
    return {"grid": LOSS_GRID, "losses": rows}


def targets(model, name: str, traces) -> dict:
    """Recall and density of every document of every domain, means over layers, with parameters of one domain."""
    own = traces[name]
    policies = {rule: POLICIES.get(rule).make() for rule in RULES}
    held = {to: torch.isin(one.document, one.parts["calibrate"]).logical_not() for to, one in traces.items()}
    sums: dict[tuple[str, str, float, str], torch.Tensor] = {}
    parameters: dict[str, list[float]] = {}
    for site in own.sites:
        ffn = ffn_of(model, site, own.activation(site))
        proxy = low_bit(ffn, group=64)
        chunks = list(scored(proxy, ffn, own.x(site, "calibrate"), label)())
        chosen = {
            (rule, value): calibrate_policy(policy, lambda chunks=chunks: chunks, Target("recall", value)).parameter
            for rule, policy in policies.items()
            for value in TARGETS
        }
        for (rule, value), parameter in chosen.items():
            parameters.setdefault(f"{rule} {value:g}", []).append(round(parameter, 6))
        for to, one in traces.items():
            x, document = one.x(site)[held[to]], one.document[held[to]]
            for key, values in measured(ffn, proxy, x, policies, chosen).items():
                of = means(values, document)
                sums[to, *key] = sums.get((to, *key), 0) + of / len(own.sites)
    rows = [
        {"used_on": to, "rule": rule, "target": value, "measure": what, "documents": rounded(one)}
        for (to, rule, value, what), one in sums.items()
    ]
    return {"parameters": parameters, "calibrating": len(own.parts["calibrate"]), "rows": rows}


def measured(ffn, proxy, x, policies, chosen) -> dict:
    parts: dict = {}
    for tokens, truth in truths(ffn, x, label):
        scores = proxy(tokens)
        for (rule, value), parameter in chosen.items():
            mask = policies[rule].select(scores, parameter)
            for what, one in of_mask(mask, truth, ("recall", "density")).items():
                parts.setdefault((rule, value, what), []).append(one)
    return {key: torch.cat(values) for key, values in parts.items()}


MISSES = {"missed_mass": lambda truth: truth.contributions, "recall": lambda truth: truth.labels}
"""Loss -> weight of each channel [T, d_ff], of which it is the share that is not kept; of recall it is 1 - recall."""


def missed(truth, scores, weight) -> torch.Tensor:
    """The share of the weight that is not kept at every density of the grid [n, T]."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    held = weight(truth).double().gather(1, order).cumsum(-1)
    kept = torch.tensor([int(density * scores.shape[1]) for density in GRID])
    return 1 - (held[:, kept - 1] / held[:, -1:]).T


def errors(truth, scores) -> torch.Tensor:
    """The relative error of the output, at most 1, at every coarse density [n, T]."""
    masks = (TopK().select(scores, int(density * scores.shape[1])) for density in COARSE)
    return torch.stack([of_mask(mask, truth, ("relative_error",))["relative_error"].clamp(max=1) for mask in masks])


def certificates(model, traces, measure: str) -> dict:
    """Mean loss of every document at every density of a grid (top-k by 4 bits), means over layers."""
    total = 0
    for site in traces.sites:
        ffn = ffn_of(model, site, traces.activation(site))
        proxy, rows = low_bit(ffn, group=64), []
        for tokens, truth in truths(ffn, traces.x(site), label):
            scores = proxy(tokens)
            rows.append(missed(truth, scores, MISSES[measure]) if measure in MISSES else errors(truth, scores))
        found = torch.cat(rows, 1)
        total = total + torch.stack([means(row, traces.document) for row in found]) / len(traces.sites)
    return {"grid": GRID if measure in MISSES else COARSE, "losses": [rounded(row) for row in total]}


def means(values, document):
    """Mean of the values of every document, ascending."""
    _, place, sizes = document.unique(return_inverse=True, return_counts=True)
    return torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, place, values) / sizes


def rounded(values) -> list[float]:
    return [round(float(value), 4) for value in values]
