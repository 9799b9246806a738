"""The guide's example (examples/guide.yaml) with every metric on a random 4-layer Llama (d_model 64, d_ff 192): time.

    python benchmarks/guide_tiny.py

60 lines of text calibrate, one window each, and as many others evaluate. Every registered metric is scored, every
algorithm of the example runs at its three sparsities, samples and plots are made. The public NodeLens needed 377 s for
9 of its 12 methods on 60 lines, perplexity only (our own run of it, on another machine), for such a model with the
vocabulary of GPT-2: nearly all of its 6.4 million parameters. So both a small vocabulary and that one are timed. The
time of the processor is told beside the wall's, because a busy machine stretches the latter. One thread: so small a
model gains nothing from a second one.
"""

from __future__ import annotations

import io
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from ffnscope.calibrate.corpora import corpus
from ffnscope.registry import METRICS
from ffnscope.run import load_config, run
from ffnscope.run.progress import Reporter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from checkpoints import make_checkpoint  # noqa: E402

REPEATS = {300: 3, 50_257: 1}
"""Vocabulary -> runs."""
LINES, WORDS = 60, 40
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}


def lines(split):
    words = " ".join(text for _, text in corpus("sotu", split)[:4]).split()
    return "".join(" ".join(words[i : i + WORDS]) + "\n" for i in range(0, LINES * WORDS, WORDS))


def overrides(folder, out):
    return [
        f"model.model_id={folder / 'model'}",
        f"model.reference_id={folder / 'before'}",
        "model.dtype=float32",
        "model.device_map=null",
        "experiment.device=cpu",
        f"dataset.name={folder / 'train.txt'}",
        "dataset.subset=null",
        "dataset.split=null",
        "dataset.batch_size=8",
        "calibration.mode=lines",
        f"calibration.num_samples={LINES}",
        f"metrics.scar.num_samples={LINES}",
        f"metrics.enabled=[{', '.join(METRICS.names())}]",
        "metrics.composite.parts={wanda: 1.0, scar_loss_proxy: 1.0}",
        f"evaluation.name={folder / 'test.txt'}",
        "evaluation.split=null",
        "evaluation.num_samples=40",
        "evaluation.max_length=128",
        f"output.dir={out}",
    ]


def timed(folder, vocabulary, repeats):
    for seed, name in enumerate(("model", "before")):
        make_checkpoint(folder / name, "llama", seed=seed, vocab_size=vocabulary, **SHAPE)
    times = []
    for i in range(repeats):
        config = load_config(ROOT / "examples" / "guide.yaml", overrides(folder, folder / f"out_{vocabulary}_{i}"))
        start, busy = time.perf_counter(), time.process_time()
        result = run(config, reporter=Reporter(Console(file=io.StringIO())))
        times.append(time.perf_counter() - start)
        busy = time.process_time() - busy
        machine = f"processor {busy:.1f} s, load {os.getloadavg()[0]:.1f}"
        made = f"{len(result.rows)} rows, {len(result.scores)} metrics"
        print(f"vocabulary {vocabulary}, run {i}: {times[-1]:.1f} s ({machine}), {made}", flush=True)
    spread = f"min {min(times):.1f}, max {max(times):.1f}, n {repeats}"
    print(f"vocabulary {vocabulary}: median {statistics.median(times):.1f} s ({spread})", flush=True)


def main():
    torch.set_num_threads(1)
    print(f"{platform.machine()}, 1 thread; plots and samples included", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split in ("train", "test"):
            (folder / f"{split}.txt").write_text(lines(split), encoding="utf-8")
        for vocabulary, repeats in REPEATS.items():
            timed(folder, vocabulary, repeats)


if __name__ == "__main__":
    main()
