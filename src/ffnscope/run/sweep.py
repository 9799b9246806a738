"""Run a sweep: every cell in a folder of its own, what is finished not again, and one report of all."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffnscope.apply.folder import held
from ffnscope.errors import ArtifactError, ConfigError, FFNScopeError, SweepError
from ffnscope.io import hash_json, write_csv, write_json
from ffnscope.report.sweep_page import CellResult, sweep_rows, write_sweep_page
from ffnscope.run.executors import JOBS, check_executor, execute
from ffnscope.run.folder import CONFIG, check_folder
from ffnscope.run.lines import duration
from ffnscope.run.outputs import PAGE, check_plots
from ffnscope.run.progress import Reporter
from ffnscope.run.schema import RunConfig
from ffnscope.run.sweep_cells import Cell, SweepConfig, in_cells
from ffnscope.run.sweep_record import RECORD, SweepRecord
from ffnscope.run.windows import check_texts
from ffnscope.saving import check_writable, writing

RESULTS = ("sweep_results.csv", "sweep_results.json")


@dataclass(frozen=True, slots=True)
class SweepResult:
    """A sweep that has ended: its folder, every cell with what it left, and what stopped those that failed."""

    folder: Path
    cells: list[CellResult]

    @property
    def failed(self) -> dict[str, str]:
        """Name of a cell that failed -> what stopped it."""
        return {cell.name: cell.error for cell in self.cells if cell.error}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One flat row per finished cell, model and text."""
        return sweep_rows(self.cells)

    def check(self) -> None:
        """Raise SweepError when a cell failed."""
        if self.failed:
            raise SweepError(self.failed, len(self.cells))


def run_sweep(sweep: SweepConfig, *, overwrite: bool = False, reporter: Reporter | None = None) -> SweepResult:
    """Run the cells that are not finished, then write the tables and the report of all.

    A cell that fails does not stop the others: ask the result by ``failed`` or ``check()``; the next call tries it
    again. An interrupted sweep goes on. Cells that were never begun come first, so that one which ends the process
    (killed for its memory) cannot keep the others from their turn.

    Args:
        sweep: from `load_sweep`.
        overwrite: bring folders of other configurations up to date, as `ffnscope.run.run` does.
        reporter: where progress goes; default: the terminal's standard error.

    Raises:
        ConfigError: what stops cells at once (a folder of another run, a missing text, matplotlib): of all cells.
        UsageError: the executor is not installed, or does not take the resources.
        ArtifactError: another process works in the folder, or it cannot be written.
    """
    reporter = reporter or Reporter()
    check_sweep(sweep, overwrite=overwrite)
    with writing(sweep.folder):
        sweep.folder.mkdir(parents=True, exist_ok=True)
    with held(sweep.folder):
        record = SweepRecord(sweep)
        todo = record.unfinished()
        done = len(sweep.cells) - len(todo)
        reporter.say(f"sweep {sweep.name}: {len(sweep.cells)} cells, {done} of them finished -> {sweep.folder}")
        _run_cells(sweep, record, todo, reporter, overwrite=overwrite)
        result = SweepResult(sweep.folder, record.results())
        _write_results(sweep, result, reporter)
    return result


def check_sweep(sweep: SweepConfig, *, overwrite: bool = False) -> None:
    """Find what would stop cells at once, before any work; see `run_sweep`."""
    check_executor(sweep.asked)
    _check_root(sweep, overwrite=overwrite)
    problems: dict[str, list[str]] = {}
    texts: dict[str, str | None] = {}
    blocks = {"dataset", "calibration", "evaluation", "supernode"}
    for cell in sweep.cells:
        key = hash_json(cell.config.model_dump(mode="json", include=blocks))
        if key not in texts:
            texts[key] = _error(check_texts, cell.config)
        plots, folder = _error(check_plots, cell.config), _error(check_folder, cell.config, overwrite=overwrite)
        for message in filter(None, (texts[key], plots, folder)):
            problems.setdefault(message, []).append(cell.name)
    if problems:
        n = len(sweep.cells)
        told = [message if len(of) == n else f"{in_cells(of)}: {message}" for message, of in problems.items()]
        raise ConfigError(f"sweep {sweep.name}", told)


def _check_root(sweep: SweepConfig, *, overwrite: bool) -> None:
    """Refuse a folder that is not a sweep's; what each cell's own folder holds is checked by cell."""
    folder = sweep.folder
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; output.dir must be a folder.")
    check_writable(folder)
    with writing(folder):
        held = {path.name for path in folder.iterdir()} if folder.exists() else set[str]()
    if overwrite or RECORD in held or held <= {JOBS, PAGE, *RESULTS, *(cell.name for cell in sweep.cells)}:
        return
    what = "a single run" if CONFIG in held else "something else"
    raise ArtifactError(
        f"{folder} holds {what} and no {RECORD}, so it is not the folder of a sweep. Choose another output.dir, or "
        "pass --overwrite to write beside it."
    )


def _error(check: Callable[..., None], config: RunConfig, **options: Any) -> str | None:
    """What a check says against a configuration."""
    try:
        check(config, **options)
    except FFNScopeError as error:
        return str(error)
    return None


def _run_cells(
    sweep: SweepConfig, record: SweepRecord, todo: Sequence[Cell], reporter: Reporter, *, overwrite: bool
) -> None:
    if not todo:
        return
    outcomes = execute(sweep.asked, sweep.folder, todo, overwrite=overwrite, reporter=reporter)
    record.write()
    start = time.perf_counter()
    with contextlib.closing(outcomes):
        for i, outcome in enumerate(outcomes, 1):
            record.note(outcome.cell, outcome.error)
            if outcome.error:
                reporter.say(f"cell {outcome.cell.name} failed: {outcome.error}")
            left = (time.perf_counter() - start) / i * (len(todo) - i)
            reporter.say(f"{i} of {len(todo)} cells" + (f", about {duration(left)} left" if i < len(todo) else ""))


def _write_results(sweep: SweepConfig, result: SweepResult, reporter: Reporter) -> None:
    as_csv, as_json = (sweep.folder / name for name in RESULTS)
    write_csv(as_csv, result.rows)
    write_json(as_json, {"rows": result.rows})
    if any(cell.config.output.report for cell in sweep.cells):
        with reporter.task("report", "pages"):
            write_sweep_page(sweep.name, result.cells, sweep.folder / PAGE)
    reporter.say(f"results in {sweep.folder}")
