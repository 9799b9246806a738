"""The table of benchmarks/structured.py from its cells."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

from ffnscope.evaluate.intervals import over_documents
from ffnscope.io import write_text

DOMAINS = ("in", "out")
CHANNELS = "channels"
"""What the sparsity of a cell is of, where it does not say so itself."""


def read(*paths: Path) -> list[dict]:
    """The cells of all files that are there; the last of equal ones counts."""
    lines = [line for path in paths if path.exists() for line in path.read_text().splitlines()]
    cells = [{"of": CHANNELS} | json.loads(line) for line in lines if line]
    return list({key(one): one for one in cells}.values())


def key(cell: dict) -> tuple[str, float, int, str]:
    """What makes a cell that cell."""
    return cell["row"], cell["sparsity"], cell["seed"], cell["of"]


def perplexity(cell: dict, domain: str) -> float:
    return math.exp(sum(cell["nll"][domain]) / cell["targets"][domain])


def write(cells: Iterable[Path], out: Path, score_only: tuple[str, ...], default: str) -> None:
    """Write one table per sparsity of channels, then those of single weights, one per pattern and sparsity."""
    found = read(*cells)
    dense = next(c for c in found if c["row"] == "dense")
    if {one["texts"] for one in found} != {dense["texts"]}:
        raise ValueError("the cells are of several evaluation texts")
    by: dict[tuple[str, float], dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for one in found:
        if one is not dense:
            by[one["of"], one["sparsity"]][one["row"]].append(one)
    pieces = " / ".join(str(len(set(dense["documents"][d]))) for d in DOMAINS)
    words = " / ".join(f"{perplexity(dense, d):.2f}" for d in DOMAINS)
    lines = [HEAD, "", f"Dense: {words} (in / out of domain); {pieces} documents.", ""]
    saved = [one for one in found if one.get("reloaded")]
    lines += [RELOADED.format(n=len(saved)), ""] if saved else []
    for of, sparsity in sorted(by, key=lambda one: (one[0] != CHANNELS, one)):
        if of == CHANNELS:
            lines += section(sparsity, by[of, sparsity], dense, score_only, default)
        else:
            lines += section_of_weights(of, sparsity, by[of, sparsity])
    write_text(out, "\n".join(lines))


def section(sparsity: float, rows: dict[str, list[dict]], dense: dict, score_only, default: str) -> list[str]:
    """The rows of one sparsity, best in domain first."""
    excess = {d: {row: mean_nll(cells, d) - mean_nll([dense], d) for row, cells in rows.items()} for d in DOMAINS}
    best = {d: min((row for row in rows if row in score_only), key=excess[d].__getitem__, default="") for d in DOMAINS}
    lines = [f"## {sparsity:.0%} of the channels removed", "", COLUMNS, RULE]
    for row in sorted(rows, key=excess["in"].__getitem__):
        words = [f"**{row}**" if row == default else row, str(len(rows[row]))]
        for domain in DOMAINS:
            words.append(f"{math.exp(mean_nll(rows[row], domain)):.2f}")
            words.append(share(rows[row], rows.get(best[domain], []), dense, domain))
            words.append(against(rows[row], rows.get(default, []), domain) if row != default else "")
        lines.append("| " + " | ".join(words) + " |")
    seeds = sorted(rows.get(default, []), key=lambda one: one["seed"])
    told = "; ".join(" / ".join(f"{perplexity(one, d):.2f}" for d in DOMAINS) for one in seeds)
    return [*lines, "", *([f"The default, seed by seed: {told}.", ""] if len(seeds) > 1 else [])]


def paired(row: list[dict], other: list[dict]) -> list[tuple[dict, dict]]:
    """Cells of equal seeds; what has seed 0 alone and reads no text stands for every seed."""
    first, second = ({one["seed"]: one for one in cells} for cells in (row, other))
    if any(one.get("any_seed") for one in row):
        first = dict.fromkeys(second, row[0])
    if any(one.get("any_seed") for one in other):
        second = dict.fromkeys(first, other[0])
    return [(first[seed], second[seed]) for seed in sorted(set(first) & set(second))]


def share(row: list[dict], best: list[dict], dense: dict, domain: str) -> str:
    """Excess log-perplexity of the row over that of the best score-only row, both of the seeds that both have."""
    pairs = paired(row, best)
    if not pairs:
        return ""
    start = mean_nll([dense], domain)
    ours, theirs = (mean_nll(list(cells), domain) - start for cells in zip(*pairs, strict=True))
    return f"{ours / theirs:.3f}"


def section_of_weights(of: str, sparsity: float, rows: dict[str, list[dict]]) -> list[str]:
    """Rows that set single weights to zero: nothing gets smaller, so no share of and no interval against channels."""
    lines = [f"## Not channel pruning: {sparsity:.0%} of the {of}", "", OF_WEIGHTS, "", WEIGHT_COLUMNS, WEIGHT_RULE]
    for row in sorted(rows, key=lambda row: mean_nll(rows[row], "in")):
        found = [f"{math.exp(mean_nll(rows[row], domain)):.2f}" for domain in DOMAINS]
        lines.append("| " + " | ".join([row, str(len(rows[row])), *found]) + " |")
    return [*lines, ""]


def mean_nll(cells: list[dict], domain: str) -> float:
    """Nats per token, mean over seeds."""
    return sum(sum(c["nll"][domain]) / c["targets"][domain] for c in cells) / len(cells)


def against(row: list[dict], default: list[dict], domain: str) -> str:
    """Log-perplexity of the row minus that of the default, over the seeds that both have; 95 % interval by document."""
    pairs = paired(row, default)
    if not pairs:
        return ""
    differences = torch.stack([nll(theirs, domain) - nll(ours, domain) for theirs, ours in pairs]).mean(0)
    counts = torch.full_like(differences, row[0]["targets"][domain] / len(differences))
    found = over_documents(differences, torch.tensor(row[0]["documents"][domain]), counts)
    return f"{found.value:+.3f} ± {found.high - found.value:.3f}"


def nll(cell: dict, domain: str) -> torch.Tensor:
    return torch.tensor(cell["nll"][domain], dtype=torch.float64)


HEAD = (
    "Made by `benchmarks/structured.py`, whose docstring has the protocol: SmolLM2-135M-Instruct, FFN channels only, "
    "nothing trained but where a row says so, 32,768 calibration tokens (speeches and source code, mixed), 16,352 "
    "predicted tokens of each evaluation text: unseen speeches and source code (in domain), and Python's help topics "
    "(another kind of text, though near to source code), in splits on which no default was chosen. "
    "Share: excess log-perplexity over dense as a share of that of the best score-only row (no refit, no bias) of "
    "the domain. Against the default: difference of log-perplexity, paired by window, 95 % interval over documents; "
    "above zero the default is better. Both take the seeds that both rows have. Rows whose plan reads no text have one "
    "seed. Published rows differ from their papers where a common budget asks it: scores of the dense model in one "
    "pass (Wanda was published layer by layer), and no layer is spared (LLM-Pruner spares the first and the last)."
)
RELOADED = (
    "Checkpoints of the default at 50 %, saved and loaded again by `transformers` alone (with `trust_remote_code`, as "
    "widths differ from layer to layer): the same sums "
    "of every window as before saving, to the last of three decimals, for {n} seed(s) (another sum ends the run)."
)
COLUMNS = (
    "| method | seeds | perplexity in domain | share | against default "
    "| perplexity out of domain | share | against default |"
)
RULE = "|---|---|---|---|---|---|---|---|"
OF_WEIGHTS = (
    "Sparsity is of gate, up and down of all FFNs; attention, embeddings and LM head stay whole. Every tensor keeps "
    "its shape and the checkpoint its size: not to be compared with the rows above at equal sparsity."
)
WEIGHT_COLUMNS = "| method | seeds | perplexity in domain | perplexity out of domain |"
WEIGHT_RULE = "|---|---|---|---|"
