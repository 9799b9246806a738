"""One FFN of one token: reading only selected channels, over torch dense and over what the memory allows.

    python benchmarks/sparse_ffn.py [--shapes 576x1536 2048x8192 4096x14336] [--dtypes float32 bfloat16] [--record]

Per shape, dtype and density: the kernel alone, the kernel with a predictor and the selection (a random low-rank
predictor, x A B with rank d_model / 8, its top k, sorted), and the same product by gathers in torch. All take turns
with torch dense and with plain reads of memory, in an order that is drawn in every round; random channels each time; a
block larger than the last cache is read before each call. Speed-ups are ratios of medians (dense median over
quartiles). The bound is the bytes of the selected rows at the speed of the faster of two plain reads. "auto" is what
runs when dense is taken above the measured break-even.

With one thread (the default) times are CPU seconds of the thread, which other jobs disturb through shared memory
bandwidth and caches alone; with more they are wall-clock, for idle machines. --record writes results/sparse_ffn.txt.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional

from ffnscope.io import write_text
from ffnscope.sparse.kernels.break_even import break_even
from ffnscope.sparse.kernels.ffn import RowWeights, sparse_ffn
from ffnscope.sparse.kernels.rows import RowMatrix, has_compiler
from ffnscope.types import FFNWeights

RECORD = Path(__file__).parent / "results" / "sparse_ffn.txt"
DENSITIES = (1.0, 0.75, 0.5, 0.25, 0.1, 0.05)
READ = 400 * 2**20  # bytes


def device_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Shape:
    """The forms of one random FFN; each takes int32 indices, which the dense one ignores."""

    def __init__(self, d_model, d_ff, dtype):
        draw = torch.Generator().manual_seed(0)
        self.d_model, self.d_ff, self.dtype = d_model, d_ff, dtype
        shapes = ((d_ff, d_model), (d_ff, d_model), (d_model, d_ff))
        gate, up, down = ((torch.randn(s, generator=draw) / s[1] ** 0.5).to(dtype) for s in shapes)
        self.weights = FFNWeights(gate, up, down)
        self.rows = RowWeights.of(self.weights)
        self.gathers = RowWeights.of(self.weights, compiled=False)
        self.x = torch.randn(1, d_model, generator=draw).to(dtype)
        rank = d_model // 8
        self.a = torch.randn(rank, d_model, generator=draw).to(dtype)
        self.b = torch.randn(d_ff, rank, generator=draw).to(dtype)

    def dense(self, index=None):
        w = self.weights
        h = functional.silu(functional.linear(self.x, w.gate)) * functional.linear(self.x, w.up)
        return functional.linear(h, w.down)

    def sparse(self, index):
        return sparse_ffn(self.x, self.rows, index, "silu")

    def by_gathers(self, index):
        return sparse_ffn(self.x, self.gathers, index, "silu")

    def selected(self, index):
        scores = functional.linear(functional.linear(self.x, self.a), self.b)
        return self.sparse(scores[0].topk(index.numel(), sorted=False).indices.sort().values.int())

    def bytes_of(self, density):
        return 3 * round(density * self.d_ff) * self.d_model * self.dtype.itemsize

    def limit(self):
        return break_even(
            ("benchmark", self.d_model, self.dtype), self.d_ff, [self.dense], [self.sparse], torch.device("cpu")
        )

    def variants(self):
        found = {("dense", 1.0): self.dense}
        for density in DENSITIES:
            found[("sparse", density)] = self.sparse
            found[("selected", density)] = self.selected
            if density <= 0.5:
                found[("gathers", density)] = self.by_gathers
        return found


class Machine:
    """Clock, cache flush and plain reads of memory."""

    def __init__(self, threads, flush_mib):
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        self.flush = torch.ones(flush_mib * 2**18)
        self.block = torch.ones(READ // 4)
        rows = self.block.view(-1, 4096)
        self.rows, self.every = RowMatrix(rows), torch.arange(len(rows), dtype=torch.int32)
        self.ones = torch.ones(1, 4096)

    def reads(self):
        return {
            ("read by sum", 1.0): lambda index: self.block.sum(),
            ("read by product", 1.0): lambda index: self.rows.dot(self.ones, self.every),
        }

    def seconds(self, run, index):
        self.flush.sum()
        start = self.clock()
        run(index)
        return self.clock() - start


def measure(shape, machine, rounds):
    variants = {**shape.variants(), **machine.reads()}
    times = {key: [] for key in variants}
    order, draw = list(variants), torch.Generator().manual_seed(1)
    for round_ in range(rounds + 1):  # the first one compiles
        random.Random(round_).shuffle(order)
        for key in order:
            index = torch.randperm(shape.d_ff, generator=draw)[: round(key[1] * shape.d_ff)].sort().values.int()
            seconds = machine.seconds(variants[key], index)
            if round_:
                times[key].append(seconds)
    return times


def spread(dense, samples):
    middle, (low, _, high) = statistics.median(dense), statistics.quantiles(samples, n=4)
    return f"{middle / statistics.median(samples):5.2f}x ({middle / high:.2f}-{middle / low:.2f})"


def table(shape, times, limit):
    dense = times["dense", 1.0]
    read = min(statistics.median(times[f"read by {kind}", 1.0]) for kind in ("sum", "product"))
    speed, now = READ / read, statistics.median(dense)
    low, _, high = statistics.quantiles(dense, n=4)
    yield (
        f"{shape.d_model} x {shape.d_ff}, {str(shape.dtype).removeprefix('torch.')}: torch dense {now * 1e3:.2f} ms "
        f"({low * 1e3:.2f}-{high * 1e3:.2f}), {now / (shape.bytes_of(1.0) / speed):.2f} of its bound; plain read "
        f"{speed / 1e9:.1f} GB/s; break-even at density {limit:.2f}"
    )
    yield (
        "  density |  kernel  | over dense (quartiles)  | time / bound | auto over dense | kernel + selection     | "
        "torch gathers"
    )
    for density in DENSITIES:
        samples = times["sparse", density]
        median = statistics.median(samples)
        auto = "dense" if density > limit else f"{now / median:.2f}x"
        gathers = spread(dense, times["gathers", density]) if density <= 0.5 else "-"
        yield (
            f"  {density:7.0%} | {median * 1e3:5.2f} ms | {spread(dense, samples):23} | "
            f"{median / (shape.bytes_of(density) / speed):12.2f} | {auto:15} | "
            f"{spread(dense, times['selected', density]):22} | {gathers}"
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", default=["576x1536", "2048x8192", "4096x14336"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--flush-mib", type=int, default=512, help="more than the last level of cache")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = "CPU time of the thread" if args.threads == 1 else "wall-clock"
    lines = [
        f"{device_name()}, {args.threads} thread{'s' * (args.threads > 1)}, {clock}, torch {torch.__version__}, "
        f"{'numba' if has_compiler() else 'no numba'}, {args.rounds} rounds, {args.flush_mib} MiB read before each call"
    ]
    print(lines[0], flush=True)
    machine = Machine(args.threads, args.flush_mib)
    with torch.inference_mode():
        for name in args.shapes:
            for dtype in args.dtypes:
                shape = Shape(*map(int, name.split("x")), getattr(torch, dtype))
                times = measure(shape, machine, args.rounds)
                for line in table(shape, times, shape.limit()):
                    print(line, flush=True)
                    lines.append(line)
                del shape, times
    if args.record:
        write_text(RECORD, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
