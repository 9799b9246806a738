"""Simulation: do the intervals of `ffnscope score --repeats` hold the agreement of fresh calibrations?

    python benchmarks/interval_coverage.py [--pairs 100]

Documents are lognormal around the channels' own sums, 400 channels on one site. For each number of documents and noise:
the mean agreement of fresh pairs of calibrations, how often an interval from one pair holds it (95 % is asked), and the
mean width over that of the true spread (2 x 1.96 standard deviations). The jackknife is the package's; beside it a
bootstrap over documents, moved so that its mean is the value. Spearman, and Jaccard of the top 4 % (16 channels).
"""

from __future__ import annotations

import argparse

import torch

from ffnscope.analyze.agreement import jaccard, spearman
from ffnscope.analyze.jackknife import LeftOut, document_groups, jackknife_interval
from ffnscope.calibrate.windows import contiguous_windows

CHANNELS, TOP, REPLICATES = 400, 16, 60
MEASURES = {"Spearman": (spearman, (-1.0, 1.0)), "Jaccard": (lambda a, b: jaccard(a, b, TOP), (0.0, 1.0))}


def draw(n, noise, random):
    """Sums of n documents [n, channels]."""
    own = torch.exp(torch.randn(CHANNELS, generator=torch.Generator().manual_seed(99)))
    return (own * torch.exp(noise * torch.randn(n, CHANNELS, generator=random))).double()


def by_jackknife(measure, bounds, pair, random):
    wholes = [documents.sum(0) for documents in pair]
    left = []
    for own, documents in enumerate(pair):
        masks = document_groups(contiguous_windows(torch.zeros(len(documents), 2, dtype=torch.int64), ""))
        values = []
        for mask in masks:
            tables = list(wholes)
            tables[own] = wholes[own] - documents[mask].sum(0)
            values.append(measure(*tables))
        left.append(LeftOut(values, [float(mask.double().mean()) for mask in masks]))
    return jackknife_interval(measure(*wholes), left[0], left[1], bounds)


def by_bootstrap(measure, bounds, pair, random):
    value, found = measure(*(documents.sum(0) for documents in pair)), []
    for _ in range(REPLICATES):
        drawn = (documents[torch.randint(len(documents), (len(documents),), generator=random)] for documents in pair)
        found.append(measure(*(documents.sum(0) for documents in drawn)))
    known = torch.tensor(found, dtype=torch.float64)
    marks = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = (torch.quantile(known, marks) - known.mean() + value).tolist()
    return max(bounds[0], low), min(bounds[1], high)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=100)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.pairs} pairs; coverage, and width over that of the true spread")
    for name, (measure, bounds) in MEASURES.items():
        for noise in (0.5, 1.0, 2.0):
            for n in (4, 8, 16, 64):
                random = torch.Generator().manual_seed(1)
                pairs = [(draw(n, noise, random), draw(n, noise, random)) for _ in range(3 * args.pairs)]
                fresh = torch.tensor([measure(a.sum(0), b.sum(0)) for a, b in pairs], dtype=torch.float64)
                truth, spread = float(fresh.mean()), 2 * 1.96 * float(fresh.std())
                cells = []
                for label, method in (("jackknife", by_jackknife), ("bootstrap", by_bootstrap)):
                    found = [method(measure, bounds, pair, random) for pair in pairs[: args.pairs]]
                    held = sum(low <= truth <= high for low, high in found) / len(found)
                    width = sum(high - low for low, high in found) / len(found) / spread
                    cells.append(f"{label} {held:4.0%} {width:.2f}x")
                print(f"{name:8s} noise {noise} documents {n:2d}  mean {truth:.3f}  {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
