"""The page of a sweep: all cells beside each other, and how far repeats with other seeds spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffnscope.report.comparison import agreement_grids, compared_figures, compared_grids
from ffnscope.report.page import Part, write_page
from ffnscope.report.run_folder import RunFolder
from ffnscope.report.tables import BLANK, Cell, Grid, number, results_rows
from ffnscope.report.task_table import task_grid

MOST_COMPARED = 8
"""Cells up to which every pair is compared by its rankings."""
_SEED = "seed"
_SEED_NOTE = (
    "Of the cells that differ in seeds only; the deviation is that of one cell (n - 1). experiment.seed also chooses "
    "the held-out windows, calibration.seed does not."
)


@dataclass(frozen=True, slots=True)
class CellResult:
    """One cell: its values in short, what it left, and what stopped it; with both, its results are older."""

    name: str
    labels: Mapping[str, str]
    run: RunFolder | None
    error: str | None = None

    @property
    def state(self) -> str:
        """How it ended, in a few words."""
        if self.error:
            return "failed, older results" if self.run else "failed"
        return "finished" if self.run else "not run"

    @property
    def finished(self) -> RunFolder | None:
        """What it left, if that is of the last call."""
        return None if self.error else self.run

    @property
    def group(self) -> tuple[tuple[str, str], ...]:
        """Its values without those that are seeds: cells of one group repeat each other."""
        return tuple((key, value) for key, value in self.labels.items() if not is_seed(key))


def is_seed(axis: str) -> bool:
    """Whether the values of an axis are seeds."""
    return axis.rsplit(".", 1)[-1] == _SEED


def sweep_rows(cells: Sequence[CellResult]) -> list[dict[str, Any]]:
    """Flat rows for CSV and JSON: one per finished cell, model and text; axes are columns ``sweep.AXIS``."""
    axes = _axes(cells)
    return [
        {"cell": cell.name, **{f"sweep.{axis}": cell.labels.get(axis) for axis in axes}, **row}
        for cell in cells
        if cell.finished
        for row in results_rows(cell.finished.rows)
    ]


def sweep_grids(cells: Sequence[CellResult]) -> list[Grid]:
    """Tables of a sweep: cells, perplexities, spread over seeds, tasks, agreement of the rankings where few.

    Results of an earlier call, of cells that have failed since, stand in tables of their own.
    """
    runs = {cell.name: cell.finished for cell in cells if cell.finished}
    older = {cell.name: cell.run for cell in cells if cell.run and not cell.finished}
    tasks = [{**row, "label": f"{name}: {row['label']}"} for name, run in runs.items() for row in run.tasks]
    return [
        _cells_grid(cells),
        *compared_grids(runs),
        *_seed_grids(cells),
        *([task_grid(tasks)] if tasks else []),
        *(agreement_grids(runs) if len(runs) <= MOST_COMPARED else ()),
        *(grid._replace(title=f"Outdated: {grid.title}") for grid in compared_grids(older)),
    ]


def write_sweep_page(name: str, cells: Sequence[CellResult], path: Path) -> Path:
    """Write the page of a sweep; returns ``path``.

    Raises:
        UsageError: matplotlib is not installed.
        ArtifactError: the file cannot be written.
    """
    runs = {cell.name: cell.finished for cell in cells if cell.finished}
    failed = [f"{cell.name} failed: {cell.error}" for cell in cells if cell.error]
    older = [cell.name for cell in cells if cell.run and not cell.finished]
    told = [f"{len(runs)} of {len(cells)} cells are finished; each has a report of its own in its folder.", *failed]
    if older:
        told.append(f"Of an earlier call, and in no other table than those called outdated: {', '.join(older)}.")
    parts = [Part("compared", "Side by side", told, sweep_grids(cells), compared_figures(runs))]
    return write_page(path, f"Sweep {name}", f"{len(cells)} cells", parts)


def _axes(cells: Sequence[CellResult]) -> list[str]:
    return list(dict.fromkeys(axis for cell in cells for axis in cell.labels))


def _cells_grid(cells: Sequence[CellResult]) -> Grid:
    axes = _axes(cells)
    lines = [
        [
            Cell(cell.name),
            *(Cell(cell.labels.get(axis, BLANK)) for axis in axes),
            Cell(cell.state),
            Cell(_seconds(cell.run) if cell.run else BLANK),
        ]
        for cell in cells
    ]
    return Grid("Cells", ["cell", *axes, "state", "seconds"], lines, [])


def _seconds(run: RunFolder) -> str:
    return number(sum(stage["seconds"] for stage in run.summary["stages"].values()))


def _seed_grids(cells: Sequence[CellResult]) -> Iterator[Grid]:
    """Mean and spread of the perplexity over cells that differ in seeds only, a table per text."""
    if not any(is_seed(axis) for axis in _axes(cells)):
        return
    found: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        what = ",".join(f"{key}={value}" for key, value in cell.group)
        for row in results_rows(cell.finished.rows) if cell.finished else ():
            if row["perplexity"] is not None:
                name = f"{what}: {row['label']}" if what else row["label"]
                found.setdefault(row["dataset"], {}).setdefault(name, []).append(row["perplexity"])
    columns = ["cells and model", "seeds", "mean perplexity", "standard deviation", "range"]
    for dataset, by_name in found.items():
        repeated = {name: values for name, values in by_name.items() if len(values) > 1}
        lines = [[Cell(n), Cell(str(len(values))), *map(Cell, _spread(values))] for n, values in repeated.items()]
        if lines:
            yield Grid(f"Over seeds: {dataset}", columns, lines, [_SEED_NOTE])


def _spread(values: Sequence[float]) -> list[str]:
    ends = f"{number(min(values))} – {number(max(values))}"
    return [number(statistics.mean(values)), number(statistics.stdev(values)), ends]
