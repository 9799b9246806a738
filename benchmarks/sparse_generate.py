"""Tokens per second of `generate` with a wrapped model of random weights, over what the FFN's share of the time allows.

    python benchmarks/sparse_generate.py [--dtypes float32 bfloat16] [--threads 1 2] [--layers 16] [--record]

The shapes are those of Llama-3.2-1B. Selections are random masks that are drawn before the clock runs, so the time is
that of the runtime as it is by default: masks to indices, kernels or dense FFNs, and all that is not FFN. With s, the
measured share of the FFNs in the time of a dense step, no runtime can be faster than 1 / (1 - s + s * density) times
dense. Variants take turns in every round; times are medians of the rounds, with the smallest and the largest. With one
thread (the default) times are CPU seconds of the thread. --record writes results/sparse_generate.txt.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path

import torch
import transformers
from sparse_ffn import device_name
from transformers import LlamaConfig, LlamaForCausalLM

from ffnscope.ffn.sites import find_sites
from ffnscope.io import write_text
from ffnscope.sparse.runtime import unwrap_, wrap_

RECORD = Path(__file__).parent / "results" / "sparse_generate.txt"
DENSITIES = (0.5, 0.25, 0.1, 0.05)
PROMPT = 8


def build(args, dtype):
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.data.uniform_(-0.03, 0.03)
    model.tie_weights()
    rotary = model.model.rotary_emb
    rotary.__init__(config)  # its buffers were empty as well
    return model


def random_masks(site, density, n):
    draw = torch.Generator().manual_seed(site.layer)
    masks = [(torch.rand(1, site.d_ff, generator=draw) < density) for _ in range(n)]
    turn = itertools.cycle(masks)
    return lambda x: next(turn)


class Clock:
    def __init__(self, threads):
        self.now = time.thread_time if threads == 1 else time.perf_counter

    def step_seconds(self, model, tokens):
        """Seconds per decoding step of `generate`, and those within the FFNs."""
        spent, starts, marks = [0.0], [], []

        def begin(module, args):
            starts.append(self.now())

        def end(module, args, output):
            spent[0] += self.now() - starts.pop()

        def mark(module, args, kwargs):
            marks.append((self.now(), spent[0]))

        handles = [model.register_forward_pre_hook(mark, with_kwargs=True)]
        for layer in model.model.layers:
            handles += [layer.mlp.register_forward_pre_hook(begin), layer.mlp.register_forward_hook(end)]
        ids = torch.randint(3, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens + 2, do_sample=False)
        for handle in handles:
            handle.remove()
        (start, before), (stop, after) = marks[1], marks[-1]  # after the prompt
        return (stop - start) / (len(marks) - 2), (after - before) / (len(marks) - 2)


def measure(model, args, threads):
    clock, sites = Clock(threads), find_sites(model)
    times = {density: [] for density in (1.0, *DENSITIES)}
    shares = []
    for round_ in range(args.rounds + 1):  # the first one compiles
        for density in times:
            if density == 1.0:
                seconds, inside = clock.step_seconds(model, args.tokens)
                shares += [inside / seconds] if round_ else []
            else:
                wrap_(model, {s: random_masks(s, density, args.tokens) for s in sites})
                seconds, _ = clock.step_seconds(model, args.tokens)
                unwrap_(model)
            if round_:
                times[density].append(seconds)
    return times, statistics.median(shares)


def told(samples):
    return f"{statistics.median(samples) * 1e3:.0f} ms per token ({min(samples) * 1e3:.0f}-{max(samples) * 1e3:.0f})"


def run(args, dtype, threads):
    """Yield the lines of one dtype and number of threads."""
    torch.set_num_threads(threads)
    times, share = measure(build(args, dtype), args, threads)
    dense = statistics.median(times[1.0])
    yield (
        f"{device_name()}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {args.layers} layers of Llama-3.2-1B, {dtype}, {args.rounds} rounds of "
        f"{args.tokens} tokens: dense {told(times[1.0])}, {share:.0%} of it in FFNs"
    )
    for density in DENSITIES:
        faster, bound = dense / statistics.median(times[density]), 1 / (1 - share + share * density)
        yield (
            f"  density {density:4.0%}: {told(times[density])}, {faster:.2f}x dense; at most {bound:.2f}x is possible: "
            f"{faster / bound:.2f} of it, asked for: 0.8"
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    args, lines = parser.parse_args(), []
    transformers.logging.set_verbosity_error()
    for dtype, threads in itertools.product(args.dtypes, args.threads):
        for line in run(args, dtype, threads):
            print(line, flush=True)
            lines.append(line)
    if args.record:
        write_text(RECORD, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
