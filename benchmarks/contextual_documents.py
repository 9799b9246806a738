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
from ffnscope.sparse.ffn import ffn_of
from ffnscope.sparse.labels import largest
from ffnscope.sparse.measures import of_mask, truths
from ffnscope.sparse.predictors.low_bit import low_bit
from ffnscope.sparse.tracing import trace

LENGTH = 96
RULES = ("top_k", "threshold", "nucleus")
TARGETS = (0.9, 0.95)
GRID = [round(0.005 * step, 3) for step in range(10, 200)]


def label(c):
    """Recall is of the 30 % of the channels with the largest contributions."""
    return largest(c, 0.3)


def traced(loaded, name: str, layers, work):
    """One window per document, from its middle; only the layers asked."""
    texts = [text for split in SPLITS for _, text in corpus(name, split)]
    middles = [text[text.find("\n", len(text) // 3) + 1 :] for text in texts]
    windows = make_windows(middles, loaded.tokenizer, n=None, length=LENGTH, mode="lines")
    sites = [site for site in find_sites(loaded.model) if site.layer in layers]
    folder = work / f"documents_{name}_{'_'.join(map(str, layers))}_{windows.hash[:12]}"
    return trace(loaded.model, windows, folder, sites=sites)


def measure(args, loaded, add) -> None:
    traces = {name: traced(loaded, name, args.layers, args.work) for name in args.domains}
    done = {(cell["domain"], tuple(cell["layers"])) for cell in contextual_table.read(args.part)}
    for name in args.domains:
        if (name, tuple(args.layers)) in done:
            continue
        start = time.perf_counter()
        found = (
            targets(loaded.model, name, traces) if args.part == "targets" else certificates(loaded.model, traces[name])
        )
        seconds = round(time.perf_counter() - start, 1)
        add({"part": args.part, "domain": name, "layers": args.layers, **found, "seconds": seconds})


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


def certificates(model, traces) -> dict:
    """Mean missed mass of every document at every density of the grid (top-k by 4 bits), means over layers."""
    total = 0
    for site in traces.sites:
        ffn = ffn_of(model, site, traces.activation(site))
        proxy, rows = low_bit(ffn, group=64), []
        kept = torch.tensor([int(density * ffn.d_ff) for density in GRID])
        for tokens, truth in truths(ffn, traces.x(site), label):
            order = proxy(tokens).argsort(dim=-1, descending=True, stable=True)
            held = truth.contributions.double().gather(1, order).cumsum(-1)
            rows.append(1 - (held[:, kept - 1] / held[:, -1:]).T)
        losses = torch.cat(rows, 1)
        total = total + torch.stack([means(row, traces.document) for row in losses]) / len(traces.sites)
    return {"grid": GRID, "losses": [rounded(row) for row in total]}


def means(values, document):
    """Mean of the values of every document, ascending."""
    _, place, sizes = document.unique(return_inverse=True, return_counts=True)
    return torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, place, values) / sizes


def rounded(values) -> list[float]:
    return [round(float(value), 4) for value in values]
