"""The commands report and compare: pages and tables of finished runs, from their files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ffnscope.cli.channels import OUT
from ffnscope.cli.files import Overwrite, check_output, check_table, write_table
from ffnscope.cli.groups import grouped
from ffnscope.errors import UsageError
from ffnscope.report.comparison import comparison_grids, comparison_rows, labelled, write_comparison
from ffnscope.report.page import write_report
from ffnscope.report.run_folder import read_run
from ffnscope.report.tables import print_grid
from ffnscope.run.progress import Reporter

PAGE, COMPARISON = "report.html", "comparison.html"
Runs = Annotated[list[Path], typer.Argument(help="Output folder of `ffnscope run`; several are compared.")]


@grouped
def report_command(
    *,
    runs: Runs,
    out: Annotated[Path | None, typer.Option(help="File to write [RUN/report.html, or comparison.html].")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the report of a finished run again, or one page that compares several."""
    path = out or (runs[0] / PAGE if len(runs) == 1 else Path(COMPARISON))
    own = out is None and len(runs) == 1  # a run's own report holds nothing that cannot be made again
    if path.suffix != ".html":
        raise UsageError(f"--out {path} must end in .html.")
    if not own:
        check_output(path, overwrite)
    found = [read_run(folder) for folder in runs]
    reporter = Reporter()
    with reporter.task("report", "pages"):
        write_report(found[0], path) if len(found) == 1 else write_comparison(labelled(found), path)
    reporter.say(f"report in {path}")


@grouped
def compare_command(
    *,
    runs: Runs,
    out: Annotated[Path | None, typer.Option(help="Also write the rows of all runs: .csv or .json.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Print what finished runs asked otherwise, their perplexities and tasks, and how alike they rank the channels."""
    check_table(out, overwrite)
    found = labelled([read_run(folder) for folder in runs])
    for grid in comparison_grids(found):
        print_grid(grid, OUT)
    if out is not None:
        write_table(out, comparison_rows(found))
