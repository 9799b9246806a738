"""Table of downstream tasks: the dense model and every plan side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ffnscope.report.tables import BLANK, Cell, Grid, grid_markdown, number, print_grid

if TYPE_CHECKING:
    from rich.console import Console

    from ffnscope.evaluate.tasks import TaskRow


def tasks_markdown(rows: Sequence[TaskRow]) -> str:
    """Return a Markdown table, task and metric x model, with lm-eval's standard errors."""
    return grid_markdown(task_grid([row.as_dict() for row in rows]))


def print_tasks(rows: Sequence[TaskRow], console: Console) -> None:
    """Print the table of `tasks_markdown` in the terminal."""
    print_grid(task_grid([row.as_dict() for row in rows]), console)


def task_grid(rows: Sequence[Mapping[str, Any]]) -> Grid:
    """Arrange rows of ``tasks.json`` (`TaskRow.as_dict`) as a table: task and metric down, models across."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        arrow = {True: " ↑", False: " ↓", None: ""}[row["higher_is_better"]]
        shots = "" if row["num_fewshot"] is None else f", {row['num_fewshot']}-shot"
        name = f"{row['task']}{shots} ({row['n']:,}): {row['metric']}{arrow}"
        cells.setdefault(name, {})[row["label"]] = number(row["value"], row["stderr"])
    lines = [[Cell(name), *(Cell(found.get(label, BLANK)) for label in labels)] for name, found in cells.items()]
    notes = [f"Protocol: {p}." for p in dict.fromkeys(row["protocol"] for row in rows)]
    notes.append("In brackets: questions. ↑ higher is better, ↓ lower. ± standard error as lm-eval reports it.")
    return Grid("Downstream tasks", ["task", *labels], lines, notes)
