"""One FFN of one token: reading only selected channels, over torch dense and over what the memory allows.

    python benchmarks/sparse_ffn.py [--shapes 576x1536 2048x8192 4096x14336] [--dtypes float32 bfloat16]
        [--threads 1 2] [--record]

Per shape, dtype and density: the kernel alone, the kernel with a predictor and the selection (a random low-rank
predictor, x A B with rank d_model / 8, its top k, sorted), and the same product by gathers in torch. All take turns
with torch dense and with plain reads of memory, in an order that is drawn in every round, with random channels each
time. As in a decoding step, FFNs take turns, more than the last cache holds, and before each call another one runs in
the same form. Times are medians (quartiles), speed-ups dense median over quartiles. The bound is the bytes of the
selected rows, and in the second table of the predictor, at the speed of the faster of two plain reads.

"Automatic" is what the runtime runs by itself, as a share of the time of the dense FFN right before or after it: rows
up to the measured break-even and the dense FFN under the mask above it (kernel), or the dense FFN without any selection
where selecting does not pay (with selection, as `wrap_(model, card)` does). The decisions are measured once per shape
and dtype before; how long that takes is told. The last lines compare with what is asked for; what the dense FFN takes
over itself, where nothing else runs, is the noise of the comparison.

With one thread (the default) times are CPU seconds of the thread, which other jobs disturb through shared memory
bandwidth and caches alone; with more they are wall-clock, for idle machines. --record writes results/sparse_ffn.txt.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import random
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional

from ffnscope.io import write_text
from ffnscope.sparse.kernels.break_even import MARGIN, Forms, row_times, share_of_dense
from ffnscope.sparse.kernels.ffn import RowWeights, sparse_ffn
from ffnscope.sparse.kernels.rows import RowMatrix, has_compiler
from ffnscope.sparse.uses import masked
from ffnscope.types import FFNWeights

RECORD = Path(__file__).parent / "results" / "sparse_ffn.txt"
DENSITIES = (1.0, 0.75, 0.5, 0.25, 0.1, 0.05)
READ = 400 * 2**20  # bytes
PAIRS = 3
"""Comparisons of an automatic form with the dense one, in every round: they are 2 % apart at most, and noisy."""
FASTER = {"float32": 6.0, "bfloat16": 5.0}
"""Asked for at 10 % density where d_model is 2,048 or more."""


def device_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Layer:
    """One random FFN with its predictor; every form takes int32 indices, which the dense one ignores."""

    def __init__(self, shape, draw):
        d_model, d_ff, dtype, rank = shape.d_model, shape.d_ff, shape.dtype, shape.d_model // 8

        def random(n, width):
            return (torch.randn(n, width, generator=draw) / width**0.5).to(dtype)

        self.shape, self.x = shape, torch.randn(1, d_model, generator=draw).to(dtype)
        self.gate, self.up, self.down = random(d_ff, d_model), random(d_ff, d_model), random(d_model, d_ff)
        self.a, self.b = random(rank, d_model), random(d_ff, rank)
        self.rows = RowWeights.of(FFNWeights(self.gate, self.up, self.down))
        by_rows = FFNWeights(self.gate, self.up, self.rows.down.weight.T)
        self.gathers = RowWeights.of(by_rows, compiled=False)

    def dense(self, index=None, mask=None):
        h = functional.silu(functional.linear(self.x, self.gate)) * functional.linear(self.x, self.up)
        return functional.linear(h if mask is None else masked(h, mask), self.down)

    def sparse(self, index):
        return sparse_ffn(self.x, self.rows, index, "silu")

    def by_gathers(self, index):
        return sparse_ffn(self.x, self.gathers, index, "silu")

    def choose(self, k):
        scores = functional.linear(functional.linear(self.x, self.a), self.b)
        return scores[0].topk(k, sorted=False).indices.sort().values.int()

    def selected(self, index):
        return self.sparse(self.choose(index.numel()))


class Shape:
    """FFNs of one shape, and what the runtime measures to decide."""

    def __init__(self, d_model, d_ff, dtype, cache):
        draw = torch.Generator().manual_seed(0)
        self.d_model, self.d_ff, self.dtype = d_model, d_ff, dtype
        self.name = str(dtype).removeprefix("torch.")
        self.layers = [Layer(self, draw) for _ in range(max(2, math.ceil(cache / self.bytes_of(1.0))))]
        self.predictor_bytes = self.layers[0].a.nbytes + self.layers[0].b.nbytes
        self.masks = {density: torch.rand(1, d_ff, generator=draw) < density for density in DENSITIES}
        start = time.perf_counter()
        key, cpu, dense = ("benchmark", d_model, dtype), torch.device("cpu"), [one.dense for one in self.layers]
        under_masks = [lambda one=one: one.dense(mask=self.masks[0.5]) for one in self.layers]
        self.times = row_times(key, d_ff, Forms(dense, under_masks, [one.sparse for one in self.layers]), cpu)
        self.deciding = {density: self.share_of_deciding(density, key, dense) for density in DENSITIES}
        self.once = time.perf_counter() - start

    def share_of_deciding(self, density, key, dense):
        """Time of selecting and reading over dense, as the runtime measures it for the density of a card."""
        index = torch.empty(round(density * self.d_ff))  # which channels are read is decided by the predictor
        runs = [lambda one=one: one.selected(index) for one in self.layers]
        return share_of_dense((density, *key), dense, runs, torch.device("cpu"))

    def pays(self, density):
        return density <= self.times.limit and self.deciding[density] <= MARGIN

    def automatic(self, density):
        """Rows, or the dense FFN under the mask, for a selection that is there; decided before the clock runs."""
        mask = self.masks[density] if density < 1 else None  # as the runtime, which sees that nothing is left out
        return Layer.sparse if density <= self.times.limit else lambda layer, index: layer.dense(mask=mask)

    def bytes_of(self, density):
        return 3 * round(density * self.d_ff) * self.d_model * self.dtype.itemsize

    def variants(self):
        found = {("dense", 1.0): Layer.dense}
        for density in DENSITIES:
            found["sparse", density], found["selected", density] = Layer.sparse, Layer.selected
            found["automatic", density] = self.automatic(density)
            found["automatic selected", density] = Layer.selected if self.pays(density) else Layer.dense
            if density <= 0.5:
                found["gathers", density] = Layer.by_gathers
        return found


class Machine:
    """Clock, and plain reads of memory."""

    def __init__(self, threads):
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        self.block = torch.ones(READ // 4)
        rows = self.block.view(-1, 4096)
        self.rows, self.every = RowMatrix(rows), torch.arange(len(rows), dtype=torch.int32)
        self.ones = torch.ones(1, 4096)

    def reads(self):
        return {
            ("read by sum", 1.0): lambda layer, index: self.block.sum(),
            ("read by product", 1.0): lambda layer, index: self.rows.dot(self.ones, self.every),
        }

    def seconds(self, run, layer, index):
        start = self.clock()
        run(layer, index)
        return self.clock() - start


class Turns:
    """Runs forms on one FFN after the other, each after another one ran in the same form, as in a decoding step."""

    def __init__(self, shape, machine):
        self.layers, self.d_ff, self.machine = shape.layers, shape.d_ff, machine
        self.draw, self.turn = torch.Generator().manual_seed(1), itertools.count(1)

    def seconds(self, run, density):
        now = next(self.turn)
        before, layer = (self.layers[i % len(self.layers)] for i in (now - 1, now))
        run(before, self.index(density))
        return self.machine.seconds(run, layer, self.index(density))

    def index(self, density):
        return torch.randperm(self.d_ff, generator=self.draw)[: round(density * self.d_ff)].sort().values.int()

    def ratio(self, run, density, *, dense_first):
        """Time over that of the dense FFN right before or after: a difference of 2 % would drown in drift otherwise."""
        pair = [(Layer.dense, 1.0), (run, density)]
        times = [self.seconds(*one) for one in (pair if dense_first else reversed(pair))]
        return times[1] / times[0] if dense_first else times[0] / times[1]


def measure(shape, machine, rounds):
    """Key of a form and density -> seconds of every round; of automatic forms, ratios to dense."""
    variants = {**shape.variants(), **machine.reads()}
    found = {key: [] for key in variants}
    order, turns = list(variants), Turns(shape, machine)
    for round_ in range(rounds + 1):  # the first one compiles
        random.Random(round_).shuffle(order)
        for key in order:
            if key[0].startswith("automatic"):
                values = [turns.ratio(variants[key], key[1], dense_first=bool((round_ + i) % 2)) for i in range(PAIRS)]
            else:
                values = [turns.seconds(variants[key], key[1])]
            found[key] += values if round_ else []
    return found


def median(samples, digits=2, factor=1.0):
    """The median with quartiles."""
    low, _, high = statistics.quantiles(samples, n=4)
    values = (factor * v for v in (statistics.median(samples), low, high))
    return "{} ({}-{})".format(*(f"{v:.{digits}f}" for v in values))


def speed_up(dense, samples):
    middle, (low, _, high) = statistics.median(dense), statistics.quantiles(samples, n=4)
    return f"{middle / statistics.median(samples):5.2f}x ({middle / high:.2f}-{middle / low:.2f})"


class Table:
    """The figures of one shape and dtype."""

    def __init__(self, shape, times):
        self.shape, self.times = shape, times
        self.dense = times["dense", 1.0]
        self.now = statistics.median(self.dense)
        self.speed = READ / min(statistics.median(times[f"read by {kind}", 1.0]) for kind in ("sum", "product"))

    def bound(self, density, selecting):
        return (self.shape.bytes_of(density) + selecting * self.shape.predictor_bytes) / self.speed

    def of_bound(self, kind, density):
        return statistics.median(self.times[kind, density]) / self.bound(density, kind == "selected")

    def share(self, kind, density):
        return statistics.median(self.times[kind, density]) / self.now

    def lines(self):
        shape = self.shape
        yield (
            f"{shape.d_model} x {shape.d_ff}, {shape.name}: torch dense {median(self.dense, 2, 1e3)} ms, "
            f"{self.now / self.bound(1.0, False):.2f} of its bound; plain read {self.speed / 1e9:.1f} GB/s; break-even "
            f"at density {shape.times.limit:.2f} (measured in {shape.once:.1f} s)"
        )
        for kind, title in (("sparse", "kernel alone"), ("selected", "kernel + predictor + selection")):
            automatic = "automatic" if kind == "sparse" else "automatic selected"
            gathers = " | torch gathers, over dense" if kind == "sparse" else ""
            yield (
                f"  {title}\n  density | ms (quartiles)         | over dense (quartiles)  | time / bound | automatic, "
                f"of dense (quartiles){gathers}"
            )
            for density in DENSITIES:
                samples = self.times[kind, density]
                chosen = self.times[automatic, density]
                rows = density <= shape.times.limit if kind == "sparse" else shape.pays(density)
                told = f"{median(chosen, 3)} {'rows' if rows else 'dense'}"
                other = ""
                if kind == "sparse" and density <= 0.5:
                    other = speed_up(self.dense, self.times["gathers", density])
                cells = (f"{median(samples, 3, 1e3):22}", f"{speed_up(self.dense, samples):23}")
                line = (f"  {density:7.0%}", *cells, f"{self.of_bound(kind, density):12.2f}", f"{told:31}", other)
                yield " | ".join(line).rstrip(" |")

    def verdicts(self):
        """What was asked for, with what was found."""
        shape = self.shape
        where = f"{shape.d_model} x {shape.d_ff}, {shape.name}"
        worst = {"kernel": 0.0, "with selection": 0.0, "the same dense FFN twice": 0.0}
        for density in DENSITIES:
            alone = "with selection" if shape.pays(density) else "the same dense FFN twice"
            for kind, name in (("automatic", "kernel"), ("automatic selected", alone)):
                worst[name] = max(worst[name], statistics.median(self.times[kind, density]))
        told = ", ".join(f"{name} {share:.3f}" for name, share in worst.items() if share)
        yield f"{where}: largest time of the automatic runtime over dense: {told}; asked for: at most 1.02"
        if shape.d_model >= 2048:
            found, bound = 1 / self.share("sparse", 0.1), self.of_bound("sparse", 0.1)
            yield (
                f"{where}: kernel at 10 % density {found:.2f}x dense, asked for: {FASTER[shape.name]:g}x; "
                f"{bound:.2f} of the bound, asked for: below 2"
            )


def run(args, threads):
    """Yield the lines of all shapes and dtypes."""
    torch.set_num_threads(threads)
    clock = "CPU time of the thread" if threads == 1 else "wall-clock"
    yield (
        f"{device_name()}, {threads} thread{'s' * (threads > 1)}, {clock}, torch {torch.__version__}, "
        f"{'numba' if has_compiler() else 'no numba'}, {args.rounds} rounds, {args.cache_mib} MiB of FFNs in turn"
    )
    machine, verdicts = Machine(threads), []
    for name, dtype in itertools.product(args.shapes, args.dtypes):
        shape = Shape(*map(int, name.split("x")), getattr(torch, dtype), args.cache_mib * 2**20)
        table = Table(shape, measure(shape, machine, args.rounds))
        verdicts += table.verdicts()
        yield from table.lines()
        del shape, table
    yield from verdicts


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", default=["576x1536", "2048x8192", "4096x14336"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=sorted(FASTER))
    parser.add_argument("--rounds", type=int, default=25, help="2 at least")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--cache-mib", type=int, default=512, help="FFNs that take turns have as many bytes, two at least"
    )
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    args, lines = parser.parse_args(), []
    with torch.inference_mode():
        for line in itertools.chain.from_iterable(run(args, threads) for threads in args.threads):
            print(line, flush=True)
            lines.append(line)
    if args.record:
        write_text(RECORD, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
