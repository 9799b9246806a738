"""The page of benchmarks/contextual.py from its cells: tables, splits of certificates, plots."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

import torch

from ffnscope.errors import UsageError
from ffnscope.evaluate.intervals import over_documents
from ffnscope.io import write_text
from ffnscope.report.sparse_plots import plot_quality
from ffnscope.sparse.card_options import CAP
from ffnscope.sparse.certificate import Certificate, learn_then_test, risk_control, split_conformal
from ffnscope.sparse.evaluation import FormRow
from ffnscope.types import EvalResult

CELLS = Path(__file__).parent / "results" / "contextual.jsonl"
SPLITS, ALPHA = 500, 0.1
"""Splits of the documents; share of documents, or of splits, for which a promise may fail."""
LIMITS = {
    "missed_mass": ("missed mass", (0.15, 0.25)),
    "recall": ("1 - recall", (0.05, 0.1)),
    "relative_error": ("relative error, at most 1", (0.2, 0.3)),
    "perplexity": ("rise of the perplexity", (0.1, 0.3)),
}
"""Loss -> words, and limits of it."""


def read(part: str, path: Path = CELLS) -> list[dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [cell for line in lines if line for cell in [json.loads(line)] if cell["part"] == part]


def perplexity(cell: dict) -> float:
    return math.exp(sum(cell["nll"]) / sum(cell["targets"]))


def write(plots: Path) -> None:
    """Write the page, and plots of every domain to a folder."""
    lines = [HEAD, ""]
    cells = {(c["row"], c["at"], c["domain"], c["windows"]): c for c in read("perplexity")}
    for windows in sorted({key[3] for key in cells}, reverse=True):
        lines += qualities([c for key, c in cells.items() if key[3] == windows], plots)
    lines += targets(read("targets"))
    for cell in read("certificates"):
        lines += certificates(cell)
    write_text(CELLS.with_suffix(".md"), "\n".join(lines))


def qualities(cells: list[dict], plots: Path) -> list[str]:
    lines: list[str] = []
    for domain in dict.fromkeys(c["domain"] for c in cells):
        own = [c for c in cells if c["domain"] == domain]
        dense = next((c for c in own if c["row"] == "dense"), None)
        if dense is None:
            continue
        rows: dict[str, list[FormRow]] = defaultdict(list)
        for one in own:
            if one is not dense:
                rows[one["row"]].append(form_row(one, dense))
        if not rows:
            continue
        where = "in domain" if domain == "sotu" else "out of domain"
        lines += [f"## {domain} ({where}), {len(dense['nll'])} windows, dense {perplexity(dense):.2f}", ""]
        lines += ["| row | density | bytes of dense at 16 bits, % | perplexity | over dense, % |"]
        lines += ["|---|---|---|---|---|"]
        for label, found in rows.items():
            lines += [table_line(label, one) for one in sorted(found, key=lambda one: -one.bytes_share)]
        lines.append("")
        curves: dict[str, list[FormRow]] = defaultdict(list)
        for label, found in rows.items():
            curves["dense FFN of 2 to 8 bits" if label.endswith("-bit dense FFN") else label] += found
        for cost in ("density", "bytes_share"):
            if cost == "bytes_share" or any(one.density is not None for found in rows.values() for one in found):
                plot_quality(curves, cost, plots / f"{domain}_{cost}.png", f"SmolLM2-135M-Instruct, {domain}")
    return lines


def form_row(cell: dict, dense: dict) -> FormRow:
    nll, other = (torch.tensor(c["nll"], dtype=torch.float64) for c in (cell, dense))
    counts, document = torch.tensor(cell["targets"]), torch.tensor(cell["documents"])
    value = EvalResult("perplexity", perplexity(cell), "1", None, int(counts.sum()), cell["domain"], "")
    difference = over_documents(nll - other, document, counts)
    return FormRow(cell["row"], value, difference, cell["density"], {}, cell["bytes_share"], 1.0)


def table_line(label: str, one: FormRow) -> str:
    density = "–" if one.density is None else f"{one.density:.3f}"
    less = one.difference
    ends = "" if less.low is None else f" ({change(less.low)} to {change(less.high)})"
    label = label.replace("|", "\\|")
    words = (label, density, f"{100 * one.bytes_share:.1f}", f"{one.perplexity.value:.2f}", change(less.value) + ends)
    return "| " + " | ".join(words) + " |"


def change(value: float) -> str:
    return f"{100 * math.expm1(min(value, 50)):+.1f}"


def targets(cells: list[dict]) -> list[str]:
    if not cells:
        return []
    layers = ", ".join(map(str, cells[0]["layers"]))
    lines = ["## Calibrated recall on unseen documents", "", TARGETS_HEAD.format(layers=layers), ""]
    lines += [
        "| calibrated on | used on | documents | rule | target | recall | within 1 point | density |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        by = {(r["used_on"], r["rule"], r["target"], r["measure"]): r["documents"] for r in cell["rows"]}
        for used_on, rule, target, measure in by:
            if measure == "recall":
                found = [torch.tensor(by[used_on, rule, target, m]) for m in ("recall", "density")]
                recall, density = (over_documents(one, torch.arange(len(one))) for one in found)
                interval = f"{recall.value:.4f} ({recall.low:.4f} to {recall.high:.4f})"
                name = f"{cell['domain']} ({cell['calibrating']})"
                near = "yes" if abs(recall.value - target) <= 0.01 else "no"
                near = near if used_on == cell["domain"] else "not promised"
                words = (name, used_on, recall.documents, rule, f"{target:g}", interval, near, f"{density.value:.3f}")
                lines.append("| " + " | ".join(map(str, words)) + " |")
    return [*lines, ""]


def certificates(cell: dict) -> list[str]:
    """Draw splits of the documents: calibrate the density on one half, count what goes wrong on the other."""
    losses = torch.tensor(cell["losses"], dtype=torch.float64)
    words, limits = LIMITS[cell.get("measure", "missed_mass")]
    lines = [f"## Certificates, {cell['domain']}, {words}: {losses.shape[1]} documents, {SPLITS} splits in halves", ""]
    lines += ["| what is promised | promised | found | standard error | holds | mean density |", "|---" * 6 + "|"]
    for limit in limits:
        of, bound = losses, limit
        if cell.get("measure") == "perplexity":  # certificates take losses in [0, 1]
            of, bound = (losses / (CAP * math.log1p(limit))).clamp(0, 1), 1 / CAP
        for what, certify in PROMISES.items():
            lines.append(promise(certify, of, cell["grid"], bound, what.format(words=words, limit=f"{limit:g}")))
    notes = [
        "Learn then test promises an expected loss; the mean over all documents, from which both halves are drawn, is "
        "taken for it."
    ]
    if cell.get("measure") == "perplexity":
        notes.append(f"A rise counts up to {CAP:g} times the limit and over that; a mean of {1 / CAP:g} is the limit.")
    return [*lines, "", " ".join(notes), ""]


def promise(certify, losses, grid: list[float], limit: float, what: str) -> str:
    """A line: what is promised, and what is found over splits."""
    step = max(1, len(grid) // 20) if certify is tested else 1  # a test per setting takes long
    try:
        found = [used(certify, losses[::step], grid[::step], limit, seed) for seed in range(SPLITS)]
    except UsageError:
        return f"| {what} | – | – | – | too few documents | – |"
    promised = limit if certify is risk_control else ALPHA
    wrong, density = (torch.tensor([one[i] for one in found], dtype=torch.float64) for i in (0, 1))
    mean, error = float(wrong.mean()), float(wrong.std()) / math.sqrt(SPLITS)
    holds = "yes" if mean <= promised + 2 * error else "no"
    told = f"{error:.4f}" if error >= 1e-4 or not error else "< 0.0001"
    return f"| {what} | {promised:g} | {mean:.4f} | {told} | {holds} | {float(density.mean()):.3f} |"


def conformal(losses, limit: float) -> Certificate:
    return split_conformal(losses, limit, ALPHA)


def tested(losses, limit: float) -> Certificate:
    return learn_then_test(losses, limit, ALPHA)


PROMISES = {
    "mean over documents and splits, limit {limit} (risk control)": risk_control,
    "share of documents above {limit} (split conformal)": conformal,
    "share of splits with a mean over all documents above {limit} (learn then test)": tested,
}
"""What is counted -> certificate."""


def used(certify, losses, grid: list[float], limit: float, seed: int) -> tuple[float, float]:
    """What goes wrong on one half of the documents at the density that the other half certifies, and that density."""
    order = torch.randperm(losses.shape[1], generator=torch.Generator().manual_seed(seed))
    half = len(order) // 2
    dense = torch.zeros(1, losses.shape[1], dtype=losses.dtype)
    ladder = torch.cat([dense, losses.flip(0)]).T  # documents x settings, from safe to aggressive
    certificate = certify(ladder[order[:half]], limit)
    density = [1.0, *reversed(grid)][certificate.setting]
    if certify is tested:  # the halves are drawn from these documents, so theirs is the expected loss
        return float(ladder[:, certificate.setting].mean() > limit), density
    others = ladder[order[half:], certificate.setting]
    wrong = others if certify is risk_control else (others > limit).double()
    return float(wrong.mean()), density


HEAD = (
    "Made by `benchmarks/contextual.py`, whose docstring has the protocol: SmolLM2-135M-Instruct in float32, "
    "parameters from 8,192 tokens of speeches (60 % of the documents fit, 20 % calibrate). Intervals are paired with "
    "dense and over documents, 95 %. Weights come from Q4_1, so that 4 bits may be flattered, also in groups of 64."
)
TARGETS_HEAD = (
    "Recall of the 30 % of the channels with the largest contributions, 4-bit proxy in groups of 64, mean over the "
    "FFNs of layers {layers}; 95 % intervals over documents. None of the documents was calibrated on."
)
