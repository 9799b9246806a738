"""The table of benchmarks/structured.py from its cells."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from scipy import stats as distributions

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
    by: dict[tuple[str, float], dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for one in found:
        if one is not dense:
            by[one["of"], one["sparsity"]][one["row"]].append(one)
    lines = [HEAD, "", f"Dense: {' / '.join(f'{perplexity(dense, d):.2f}' for d in DOMAINS)} (in / out of domain).", ""]
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
    best = {d: min((e for row, e in excess[d].items() if row in score_only), default=math.nan) for d in DOMAINS}
    lines = [f"## {sparsity:.0%} of the channels removed", "", COLUMNS, RULE]
    for row in sorted(rows, key=excess["in"].__getitem__):
        words = [f"**{row}**" if row == default else row, str(len(rows[row]))]
        for domain in DOMAINS:
            dense_nll = mean_nll([dense], domain)
            words += [f"{math.exp(excess[domain][row] + dense_nll):.2f}", f"{excess[domain][row] / best[domain]:.3f}"]
            words.append(against(rows[row], rows.get(default, []), domain) if row != default else "")
        lines.append("| " + " | ".join(words) + " |")
    return [*lines, ""]


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
    """Log-perplexity of the row minus that of the default, per window over the seeds that both have; 95 % interval."""
    ours = {c["seed"]: torch.tensor(c["nll"][domain], dtype=torch.float64) for c in default}
    theirs = {c["seed"]: torch.tensor(c["nll"][domain], dtype=torch.float64) for c in row}
    if len(theirs) == 1 and 0 in theirs:
        theirs = dict.fromkeys(ours, theirs[0])
    common = sorted(set(ours) & set(theirs))
    if not common:
        return ""
    difference = torch.stack([theirs[s] - ours[s] for s in common]).mean(0)
    n = len(difference)
    difference = difference * n / row[0]["targets"][domain]
    half = float(difference.std()) / math.sqrt(n) * float(distributions.t.ppf(0.975, n - 1))
    return f"{float(difference.mean()):+.3f} ± {half:.3f}"


HEAD = (
    "Made by `benchmarks/structured.py`, whose docstring has the protocol: SmolLM2-135M-Instruct, FFN channels only, "
    "nothing trained, 32,768 calibration tokens (speeches and source code, mixed), 16,352 predicted tokens of each "
    "evaluation text. "
    "Share: excess log-perplexity over dense as a share of that of the best score-only row (no refit, no bias) of the "
    "domain. Against the default: difference of log-perplexity, paired by window, with its 95 % interval over windows; "
    "above zero the default is better. Rows whose plan reads no text have one seed."
)
RELOADED = (
    "Checkpoints of the default at 50 %, saved and loaded again by plain `transformers`: the same sums "
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
