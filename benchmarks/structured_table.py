"""The table of benchmarks/structured.py from its cells."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

import torch
from scipy import stats as distributions

from ffnscope.io import write_text

DOMAINS = {"sotu": "in domain", "pydoc_topics": "out of domain"}


def read(path: Path) -> list[dict]:
    """The cells; the last of equal ones counts."""
    if not path.exists():
        return []
    cells = [json.loads(line) for line in path.read_text().splitlines() if line]
    return list({(c["row"], c["sparsity"], c["seed"]): c for c in cells}.values())


def perplexity(cell: dict, domain: str) -> float:
    return math.exp(sum(cell["nll"][domain]) / cell["targets"][domain])


def write(cells: Path, out: Path, score_only: tuple[str, ...], default: str) -> None:
    """Write one table per sparsity."""
    found = read(cells)
    dense = next(c for c in found if c["row"] == "dense")
    by: dict[float, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for one in found:
        if one is not dense:
            by[one["sparsity"]][one["row"]].append(one)
    lines = [HEAD, "", f"Dense: {' / '.join(f'{perplexity(dense, d):.2f}' for d in DOMAINS)} (in / out of domain).", ""]
    for sparsity in sorted(by):
        lines += section(sparsity, by[sparsity], dense, score_only, default)
    write_text(out, "\n".join(lines))


def section(sparsity: float, rows: dict[str, list[dict]], dense: dict, score_only, default: str) -> list[str]:
    """The rows of one sparsity, best in domain first."""
    excess = {d: {row: mean_nll(cells, d) - mean_nll([dense], d) for row, cells in rows.items()} for d in DOMAINS}
    best = {d: min((e for row, e in excess[d].items() if row in score_only), default=math.nan) for d in DOMAINS}
    lines = [f"## {sparsity:.0%} of the channels removed", "", COLUMNS, RULE]
    for row in sorted(rows, key=excess["sotu"].__getitem__):
        words = [f"**{row}**" if row == default else row, str(len(rows[row]))]
        for domain in DOMAINS:
            dense_nll = mean_nll([dense], domain)
            words += [f"{math.exp(excess[domain][row] + dense_nll):.2f}", f"{excess[domain][row] / best[domain]:.3f}"]
            words.append(against(rows[row], rows.get(default, []), domain) if row != default else "")
        lines.append("| " + " | ".join(words) + " |")
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
    "nothing trained, 32,768 calibration tokens of speeches, 16,352 predicted tokens of each evaluation text. "
    "Share: excess log-perplexity over dense as a share of that of the best score-only row (no refit, no bias) of the "
    "domain. Against the default: difference of log-perplexity, paired by window, with its 95 % interval over windows; "
    "above zero the default is better. Rows whose plan reads no text have one seed."
)
COLUMNS = (
    "| method | seeds | perplexity in domain | share | against default "
    "| perplexity out of domain | share | against default |"
)
RULE = "|---|---|---|---|---|---|---|---|"
