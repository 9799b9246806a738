"""How far the rankings of calibrations agree, as a table in the terminal or in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ffnscope.report.tables import BLANK

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("metric", "calibration", "with", "Spearman", "top 1 % Jaccard")
GIVEN_CORE = "*"
NOTES = {
    "jackknife": "In brackets: 95 % intervals over documents, from leaving out groups of them (jackknife).",
    "jackknife, fixed core": f"{GIVEN_CORE} Groups are left out with the supernode core of the whole text.",
    "no text": "No brackets: the metric reads no text, so it does not depend on the documents.",
    "one document": "No brackets: a text is a single document, so there is no interval over documents.",
    "maximum": "No brackets: the metric needs matrices of maxima, from which no document can be left out.",
}
"""How intervals were made (``interval_method``) -> the note under the table."""


def print_stability(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the rows of `ffnscope.analyze.stability.stability_rows`: agreement of rankings, with 95 % intervals."""
    from rich.table import Table
    from rich.text import Text

    table = Table(*COLUMNS, title=Text("Agreement of rankings", style="bold"), title_justify="left")
    for row in rows:
        table.add_row(*map(Text, _cells(row)))
    console.print(table)
    for note in _notes(rows):
        console.print(Text(note, style="dim"))


def stability_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of `print_stability` in Markdown."""
    lines = [COLUMNS, ("---", "---", "---", "---:", "---:"), *map(_cells, rows)]
    drawn = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    return "\n\n".join([drawn, *(note.replace("*", r"\*") for note in _notes(rows))]) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    mark = GIVEN_CORE if row["interval_method"] == "jackknife, fixed core" else ""
    numbers = (_bounded(row, name) for name in ("spearman", "top1_jaccard"))
    return [f"{row['metric']}{mark}", row["first"], row["second"], *numbers]


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {row["interval_method"] for row in rows}
    if "jackknife, fixed core" in found:
        found.add("jackknife")
    return [note for method, note in NOTES.items() if method in found]


def _bounded(row: Mapping[str, Any], name: str) -> str:
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if value is None:
        return BLANK
    if low is None or row["interval_method"] == "no text":
        return f"{value:.3f}"
    return f"{value:.3f} ({low:.3f} to {high:.3f})"
