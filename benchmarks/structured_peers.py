"""Rows of benchmarks/structured.py that others' own code makes, and unstructured and N:M baselines of the same model.

    python benchmarks/structured_peers.py [--seeds 0] [--rows LABEL ...] [--venvs FOLDER]

Peers run in an environment of their own (benchmarks/peers/README.md), made when it is missing, on the same checkpoint
and calibration windows; what they save is evaluated here by the very function of benchmarks/structured.py. Rows of
single weights (sparsity of gate, up and down of all FFNs; no channel goes) are labelled so in each cell, and stand in
sections of their own. Cells go to results/structured_peers.jsonl; an interrupted run goes on with what is missing.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import structured
import structured_rows as rows
import structured_table
from safetensors.torch import save_file

import ffnscope

PEERS = Path(__file__).parent / "peers"
CACHE = Path.home() / ".cache" / "ffnscope"


@dataclass(frozen=True)
class Peer:
    """One row at one sparsity, made by a package's own code."""

    package: str
    method: str
    sparsity: str

    @property
    def requirements(self) -> Path:
        return PEERS / f"requirements-{self.package}.txt"

    @property
    def label(self) -> str:
        version = next(line for line in self.requirements.read_text().splitlines() if line.startswith(self.package))
        return f"{version.replace('==', ' ')}: {self.method}"

    @property
    def of(self) -> str:
        return structured_table.CHANNELS if self.package != "llmcompressor" else of_weights(self.sparsity)


def of_weights(pattern: float | str) -> str:
    return f"FFN weights, {pattern}" if ":" in str(pattern) else "FFN weights, unstructured"


def fraction(pattern: float | str) -> float:
    if ":" not in str(pattern):
        return float(pattern)
    kept, group = map(int, str(pattern).split(":"))
    return 1 - kept / group


@dataclass(eq=False)
class Bench:
    """Model, evaluation texts, and the dense checkpoint that peers start from."""

    work: Path
    venvs: Path

    @cached_property
    def loaded(self):
        return ffnscope.load_model(structured.MODEL)

    @cached_property
    def texts(self):
        return structured.evaluation_windows(self.loaded)

    @cached_property
    def dense(self) -> Path:
        folder = self.work / f"dense-{ffnscope.weights_hash(self.loaded.model)[:16]}"
        if not (folder / "config.json").exists():
            self.loaded.model.save_pretrained(folder)
            self.loaded.tokenizer.save_pretrained(folder)
        return folder

    def calibration(self, seed: int) -> rows.Calibration:
        return structured.calibrated(self.loaded, seed, structured.WORK)

    def python(self, peer: Peer) -> Path:
        """The interpreter of the package's environment, which is made when it is missing."""
        folder = self.venvs / peer.package
        if not (folder / "complete").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            install = [folder / "bin" / "pip", "install", "--requirement", peer.requirements]
            subprocess.run(install, check=True)
            (folder / "complete").touch()
        return folder / "bin" / "python"


def run_peer(bench: Bench, peer: Peer, seed: int) -> None:
    out = bench.work / "peer"
    shutil.rmtree(out, ignore_errors=True)
    windows = bench.calibration(seed).windows
    text = bench.work / f"windows-{windows.hash[:16]}.safetensors"
    if not text.exists():
        save_file({"input_ids": windows.input_ids.contiguous()}, text)
    script = PEERS / f"with_{peer.package.replace('-', '_')}.py"
    paths = ["--checkpoint", bench.dense, "--windows", text, "--out", out]
    words = [bench.python(peer), script, "--method", peer.method, "--sparsity", peer.sparsity, *paths]
    subprocess.run(words, check=True)
    bench.loaded.tokenizer.save_pretrained(out)
    made = json.loads((out / "made.json").read_text())
    if f"{made['package']} {made['version']}: {peer.method}" != peer.label:
        raise ffnscope.FFNScopeError(f"{peer.label} was asked; the environment has {made}. Remove it to make it anew.")
    model = ffnscope.load_model(str(out)).model
    removed = removed_channels(bench, model) if peer.of == structured_table.CHANNELS else zeros(model)
    if abs(removed - fraction(peer.sparsity)) > 0.002:
        raise ffnscope.FFNScopeError(
            f"{peer.label}: {peer.sparsity} was asked, {removed:.4f} of the {peer.of} is gone."
        )
    add(bench, peer.label, peer.of, fraction(peer.sparsity), seed, model, removed, made["seconds"])
    shutil.rmtree(out)


def run_ours(bench: Bench, label: str, pattern: float | str, seed: int) -> None:
    start = time.perf_counter()
    sparse = rows.UNSTRUCTURED[label](bench.calibration(seed), pattern)
    seconds = time.perf_counter() - start
    model = ffnscope.sparsify_(copy.deepcopy(bench.loaded.model), sparse)
    add(bench, label, of_weights(pattern), fraction(pattern), seed, model, sparse.sparsity, seconds)


def removed_channels(bench: Bench, model) -> float:
    kept, dense = (sum(site.d_ff for site in ffnscope.find_sites(m)) for m in (model, bench.loaded.model))
    return 1 - kept / dense


def zeros(model) -> float:
    """Share of the weights of gate, up and down that are 0."""
    weights = [p for name, p in model.named_parameters() if ".mlp." in name]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def add(bench: Bench, label: str, of: str, sparsity: float, seed: int, model, removed: float, seconds: float) -> None:
    one = structured.cell(label, sparsity, seed, model, bench.texts, removed, seconds)
    structured.add(one | {"of": of}, structured.PEER_CELLS)


CHANNEL_SPARSITIES = ("0.5", "0.2", "0.3", "0.7")
METHODS = (
    ("optipfair", ("hybrid",), CHANNEL_SPARSITIES),
    ("torch-pruning", ("magnitude", "taylor, 32 windows"), CHANNEL_SPARSITIES),
    ("optipfair", ("MAW", "L2", "PON", "VOW"), ("0.5", "0.2")),
    ("llmcompressor", ("wanda", "sparsegpt"), ("0.5", "2:4", "0.2")),
)
PEER_ROWS = [
    Peer(package, method, sparsity)
    for sparsity in ("0.5", "2:4", "0.2", "0.3", "0.7")
    for package, methods, sparsities in METHODS
    for method in methods
    if sparsity in sparsities
]
PATTERNS = (0.5, "2:4", 0.2, "4:8", 0.3, 0.7)


def arguments() -> argparse.Namespace:
    labels = list(dict.fromkeys([peer.label for peer in PEER_ROWS] + list(rows.UNSTRUCTURED)))
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=labels, choices=labels, metavar="LABEL")
    parser.add_argument("--patterns", nargs="+", help="only these sparsities, such as 0.5 2:4")
    parser.add_argument("--work", type=Path, default=CACHE / "structured_peers")
    parser.add_argument("--venvs", type=Path, default=CACHE / "peers")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.work, args.venvs)
    done = structured.finished(structured.PEER_CELLS, bench.texts)
    failed = []
    for seed in args.seeds:
        jobs = [(p.label, p.sparsity, p.of, run_peer, p) for p in PEER_ROWS]
        jobs += [(n, str(s), of_weights(s), run_ours, n, s) for s in PATTERNS for n in rows.UNSTRUCTURED]
        for label, pattern, of, make, *rest in jobs:
            wanted = label in args.rows and (args.patterns is None or pattern in args.patterns)
            if not wanted or (label, fraction(pattern), seed, of) in done:
                continue
            try:
                make(bench, *rest, seed)
            except subprocess.CalledProcessError as error:
                failed.append(f"{label} at {pattern}: {error}")
    structured.write_table()
    if failed:
        sys.exit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main()
