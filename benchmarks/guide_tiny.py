"""The guide's whole example (examples/guide.yaml) on a random 4-layer Llama (d_model 64, d_ff 192): wall time.

    python benchmarks/guide_tiny.py

60 lines of text calibrate and 60 others evaluate; every algorithm of the example runs at its three sparsities. The
public NodeLens needed 377 s for 9 of its 12 methods on a model of this size (our own run of it, on another machine).
"""

from __future__ import annotations

import io
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from ffnscope.calibrate.corpora import corpus
from ffnscope.run import load_config, run
from ffnscope.run.progress import Reporter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from checkpoints import make_checkpoint  # noqa: E402

REPEATS = 3


def lines(split):
    words = " ".join(text for _, text in corpus("sotu", split)[:4]).split()
    return "\n".join(" ".join(words[i : i + 40]) for i in range(0, 60 * 40, 40))


def overrides(folder, out):
    return [
        f"model.model_id={folder / 'model'}",
        "model.dtype=float32",
        "model.device_map=null",
        "experiment.device=cpu",
        f"dataset.name={folder / 'train.txt'}",
        "dataset.subset=null",
        "dataset.split=null",
        "dataset.batch_size=8",
        "calibration.num_samples=16",
        "calibration.max_length=128",
        "calibration.batch_size=8",
        "metrics.scar.num_samples=8",
        "metrics.scar.max_length=128",
        f"evaluation.name={folder / 'test.txt'}",
        "evaluation.split=null",
        "evaluation.num_samples=16",
        f"output.dir={out}",
    ]


def main():
    times = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(
            folder / "model", "llama", hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4
        )
        for split in ("train", "test"):
            (folder / f"{split}.txt").write_text(lines(split), encoding="utf-8")
        for i in range(REPEATS):
            config = load_config(ROOT / "examples" / "guide.yaml", overrides(folder, folder / f"out{i}"))
            start = time.perf_counter()
            result = run(config, reporter=Reporter(Console(file=io.StringIO())))
            times.append(time.perf_counter() - start)
            print(f"run {i}: {times[-1]:.1f} s, {len(result.rows)} rows, {len(result.scores)} metrics", flush=True)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads: median {statistics.median(times):.1f} s "
        f"(min {min(times):.1f}, max {max(times):.1f}, n {REPEATS}), plots included"
    )


if __name__ == "__main__":
    main()
