"""Where the damage of a reconstructed model is, as a table: the error of the output of each FFN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ffnscope.apply.profile import judged_on, raised_dampings
from ffnscope.apply.reconstruction import Reconstruction
from ffnscope.report.tables import Cell, Grid, print_grid

if TYPE_CHECKING:
    from rich.console import Console

MOST = 48
"""FFNs in a table; a model of many experts has thousands."""
COLUMNS = ["FFN", "channels", "kept", "without refit", "with refit"]


def profile_grid(reconstruction: Reconstruction) -> Grid:
    """Width and relative squared error of every FFN, those with the largest error where there are many."""
    rows = reconstruction.error_profile()
    worst = sorted(rows, key=lambda row: -row["error"])[:MOST]
    shown = [row for row in rows if row in worst] if len(rows) > MOST else rows
    notes = [f"The {MOST} with the largest error of {len(rows)} FFNs."] if len(rows) > MOST else []
    notes.append(f"Squared error of the FFN's output as a share of its power, on {judged_on(rows)}.")
    raised = raised_dampings(reconstruction.facts)
    notes += [f"Damping raised, since the factorisation failed: {raised}."] if raised else []
    return Grid(f"Layer error profile: {reconstruction.name}", COLUMNS, [_line(row) for row in shown], notes)


def print_profile(reconstruction: Reconstruction, console: Console) -> None:
    """Print the table in the terminal; nothing where no error is known."""
    grid = profile_grid(reconstruction)
    if grid.lines:
        print_grid(grid, console)
        console.print()


def _line(row: Mapping[str, Any]) -> list[Cell]:
    errors = (f"{row[key]:.3g}" for key in ("error_without", "error"))
    return [Cell(str(row["site"])), *(Cell(f"{row[key]:,}") for key in ("d_ff", "width")), *map(Cell, errors)]
