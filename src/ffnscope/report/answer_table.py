"""The answer to "top-k or threshold, and which k?" on a page: tables for the terminal and Markdown, and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnscope.evaluate.intervals import Estimate
from ffnscope.io import write_json
from ffnscope.report.tables import BLANK, Cell, Grid, number, print_grid
from ffnscope.sparse.answer_rows import RULES, Answer, Calibration, EqualDensity, Reuse

if TYPE_CHECKING:
    from rich.console import Console

NAMES = {"top_k": "k", "threshold": "threshold", "nucleus": "p"}


def answer_grids(answer: Answer) -> list[Grid]:
    """Parameters per layer and domain, what they reach, both rules at one density, and the cost of reuse."""
    return [_parameters(answer), _reached(answer), _equal(answer), _reuse(answer)]


def answer_markdown(answer: Answer, title: str, made_from: Sequence[str] = ()) -> str:
    """The page as Markdown, with the recommendation first, and what it was made from last."""
    lines = [f"# {title}", "", f"**Recommended: {answer.rule}.** {answer.reason}", ""]
    for grid in answer_grids(answer):
        lines += [f"## {grid.title}", "", "| " + " | ".join(grid.columns) + " |", "|---" * len(grid.columns) + "|"]
        lines += ["| " + " | ".join(cell.text for cell in line) + " |" for line in grid.lines]
        lines += ["", *grid.notes, ""]
    if made_from:
        lines += ["## Made from", "", *(f"- {one}" for one in made_from), ""]
    return "\n".join(lines)


def print_answer(answer: Answer, console: Console) -> None:
    """Print the page in the terminal."""
    from rich.text import Text

    for grid in answer_grids(answer):
        print_grid(grid, console)
        console.print()
    console.print(Text(f"Recommended: {answer.rule}", style="bold"))
    console.print(Text(answer.reason))


def write_answer(path: Path, answer: Answer, made_from: Mapping[str, Any] | None = None) -> Path:
    """Write all numbers as JSON, with what they were made from; returns ``path``."""
    write_json(path, {"kind": "answer", "made_from": dict(made_from or {}), **answer.to_dict()})
    return path


def _parameters(answer: Answer) -> Grid:
    columns = ["FFN", *(f"{domain}: {NAMES[rule]}" for domain in answer.domains for rule in RULES)]
    found: dict[str, dict[str, str]] = {}
    for one in answer.calibrations:
        found.setdefault(one.site, {})[f"{one.domain}: {NAMES[one.rule]}"] = _parameter(one)
    lines = [[Cell(site), *(Cell(row.get(name, BLANK)) for name in columns[1:])] for site, row in found.items()]
    target = answer.options.target
    sense = "at least" if target.measure == "recall" else "at most"
    notes = [f"Calibrated on each domain's calibrating documents to {target.measure} {sense} {target.value:g}."]
    if target.measure == "recall":
        wanted = answer.options.wanted
        notes.append(
            "Recall is of the channels that contribute anything."
            if wanted is None
            else f"Recall is of the fewest channels that hold {1 - wanted:.0%} of a token's contributions."
        )
    params = ", ".join(f"{name} {value}" for name, value in answer.options.params.items())
    notes.append(f"Scores: {answer.options.predictor}{f' ({params})' if params else ''}.")
    return Grid("Parameters per FFN", columns, lines, notes)


def _parameter(one: Calibration) -> str:
    return f"{one.parameter:,.0f}" if one.rule == "top_k" else f"{one.parameter:.3g}"


def _reached(answer: Answer) -> Grid:
    measure = answer.options.target.measure
    columns = ["domain", "rule", f"{measure}, lowest to highest FFN", "density", "of a token, p5 to p95"]
    lines: list[list[Cell]] = []
    for domain in answer.domains:
        for rule in RULES:
            rows = [one for one in answer.calibrations if (one.domain, one.rule) == (domain, rule)]
            if rows:
                lines.append([Cell(domain), Cell(rule), *_of_sites(rows)])
    notes = ["On held-out documents of the domain that the parameter was calibrated on; means of FFNs."]
    return Grid("What calibrated parameters reach", columns, lines, notes)


def _of_sites(rows: list[Calibration]) -> list[Cell]:
    values = [one.reached.value for one in rows]
    density, p5, p95 = (sum(getattr(one.density, name) for one in rows) / len(rows) for name in ("mean", "p5", "p95"))
    mean = sum(values) / len(values)
    return [
        Cell(f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"),
        Cell(f"{density:.3f}"),
        Cell(f"{p5:.3f} to {p95:.3f}"),
    ]


def _equal(answer: Answer) -> Grid:
    columns = ["domain", "rule", "density", "recall", "missed mass", "relative error"]
    columns += ["perplexity", "density there", "against top_k"]
    lines = [_equal_line(one) for one in answer.equal]
    dense = {one.domain: one.dense_perplexity for one in answer.equal if one.dense_perplexity is not None}
    notes = [
        "Calibrated in every FFN to the density of top_k; on documents that had no part in it, densities differ as the "
        "column tells. Perplexity on other held-out windows, with the density there. Against top_k: change of the "
        "perplexity, paired by document, 95 % interval."
    ]
    if dense:
        notes.append("Dense perplexity: " + ", ".join(f"{name} {number(value)}" for name, value in dense.items()) + ".")
    return Grid("The rules at one density", columns, lines, notes)


def _equal_line(one: EqualDensity) -> list[Cell]:
    measures = [f"{one.measures[m].value:.3f}" for m in ("density", "recall", "missed_mass", "relative_error")]
    perplexity = BLANK if one.perplexity is None else number(one.perplexity)
    there = BLANK if one.text_density is None else f"{one.text_density:.3f}"
    return [Cell(text) for text in (one.domain, one.rule, *measures, perplexity, there, _change(one.loss))]


def _change(loss: Estimate | None) -> str:
    if loss is None:
        return BLANK
    value = f"{100 * math.expm1(loss.value):+.2f} %"
    if loss.low is None or loss.high is None:
        return value
    return f"{value} ({100 * math.expm1(loss.low):+.2f} to {100 * math.expm1(loss.high):+.2f})"


def _reuse(answer: Answer) -> Grid:
    measure = answer.options.target.measure
    columns = ["calibrated on, used on", "rule", measure, "less its own", "density", "less its own"]
    lines = [_reuse_line(one) for one in answer.reuse]
    notes = ["Its own: with parameters calibrated on the domain that they are used on; paired by document, 95 %."]
    return Grid("What it costs to reuse parameters of another domain", columns, lines, notes)


def _reuse_line(one: Reuse) -> list[Cell]:
    less = one.difference
    interval = "" if less.low is None or less.high is None else f" ({less.low:+.3f} to {less.high:+.3f})"
    return [
        Cell(f"{one.calibrated_on}, {one.used_on}"),
        Cell(one.rule),
        Cell(f"{one.reached.value:.3f}"),
        Cell(f"{less.value:+.3f}{interval}"),
        Cell(f"{one.density:.3f}"),
        Cell(f"{one.density_difference:+.3f}"),
    ]
