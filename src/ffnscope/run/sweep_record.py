"""What a sweep has done so far: which cells are finished, from what, and which failed."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ffnscope
from ffnscope.errors import ArtifactError
from ffnscope.io import SCHEMA, disposable, expect_kind, hash_file, hash_json, read_json, write_json
from ffnscope.report.run_folder import SWEEP as RECORD
from ffnscope.report.run_folder import RunFolder, read_run
from ffnscope.report.sweep_page import CellResult
from ffnscope.run.folder import CONFIG, LEDGER
from ffnscope.run.ledger import Ledger
from ffnscope.run.load import dump_config
from ffnscope.run.schema import RunConfig
from ffnscope.run.sweep_cells import Cell, SweepConfig


class SweepRecord:
    """``sweep.json``: how every cell ended, and of finished ones what they were made from."""

    def __init__(self, sweep: SweepConfig):
        self._sweep = sweep
        self._path = sweep.folder / RECORD
        self._cells: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            with disposable("every cell is looked at again, and what is finished stays"):
                value = read_json(self._path)
                expect_kind(self._path, value, "sweep")
                rows = value.get("cells")
                if not isinstance(rows, list) or not all(isinstance(r, dict) and "name" in r for r in rows):
                    raise ArtifactError(f"{self._path} is not a complete record.")
                self._cells = {row["name"]: row for row in rows}

    def unfinished(self) -> list[Cell]:
        """Cells to run, those that were never begun first. A failed one that has its old inputs again is finished."""
        found: list[Cell] = []
        for cell in self._sweep.cells:
            if self._is_finished(cell):
                self._cells[cell.name]["error"] = None
            else:
                found.append(cell)
        return sorted(found, key=lambda cell: (cell.config.output_dir / CONFIG).exists())

    def state(self, cell: Cell) -> str:
        """An unfinished cell in a word."""
        if self._cells.get(cell.name, {}).get("error"):
            return "failed"
        return "begun" if (cell.config.output_dir / CONFIG).exists() else "new"

    def note(self, cell: Cell, error: str | None) -> None:
        """Record how a cell ended. One that failed keeps what its last results, if any, were made from."""
        before = self._cells.get(cell.name, {}).get("made_from")
        made_from = before if error else _made_from(cell.config)
        self._cells[cell.name] = {
            "name": cell.name,
            "labels": dict(cell.labels),
            "made_from": made_from,
            "error": error,
        }
        self.write()

    def write(self) -> None:
        """Write the record; cells of an earlier sweep in this folder stay in it."""
        write_json(self._path, {"kind": "sweep", "schema": SCHEMA, "cells": list(self._cells.values())})

    def results(self) -> list[CellResult]:
        """Every cell with what it left; of one that failed, the results of an earlier call where they are whole."""
        return [self._result(cell, self._cells.get(cell.name, {})) for cell in self._sweep.cells]

    def _result(self, cell: Cell, row: Mapping[str, Any]) -> CellResult:
        error = row.get("error")
        run: RunFolder | None = None
        if row.get("made_from"):
            try:
                run = read_run(cell.config.output_dir) if not error or Ledger(cell.config.output_dir).intact else None
            except ArtifactError:
                if not error:
                    raise
        return CellResult(cell.name, cell.labels, run, error)

    def _is_finished(self, cell: Cell) -> bool:
        recorded = self._cells.get(cell.name, {}).get("made_from")
        try:
            return recorded == _made_from(cell.config) and Ledger(cell.config.output_dir).intact
        except ArtifactError:  # no ledger, or a damaged one, of which the run tells
            return False


def _made_from(config: RunConfig) -> str:
    """Hash of configuration, version, the run's own ledger, and every local file that it reads.

    A cell for which it is unchanged is not opened again. When it has changed, the run itself looks at weights and text,
    stage by stage. A model or dataset of the hub is taken to be what it was; ``revision`` makes sure.
    """
    stages = read_json(config.output_dir / LEDGER)
    return hash_json([ffnscope.__version__, dump_config(config), stages, list(_read_files(config))])


def _read_files(config: RunConfig) -> Iterator[list[Any]]:
    """The content of texts, tasks and statistics; of models, which are large, sizes and times.

    Whoever sets back the time of a file's content cannot set back that of its entry, which is why it is read here and
    `ffnscope.unchanged.stamp` is not: that would miss content rewritten in place under its old time. And it has device
    and inode, which tell files apart within one process. Here they are compared with what an earlier one recorded, and
    after a restart or on another machine an unchanged file may have others.
    """
    texts = (config.dataset, *config.mixed_texts, *config.evaluation_texts, *config.stability_texts)
    second = config.contextual_text
    tasks = config.task_options
    named = [text.name for text in (*texts, *([second] if second else ()))]
    named += [*(tasks.names if tasks else ()), config.metrics.background]
    yield from ([str(file), _content(*_entry(file))] for file in _files(named))
    yield from (list(_entry(file)) for file in _files([config.model.model_id, config.model.reference_id]))


def _entry(file: Path) -> tuple[str, int, int, int]:
    found = file.stat()
    return str(file), found.st_size, found.st_mtime_ns, found.st_ctime_ns


@functools.cache
def _content(file: str, *_: int) -> str:
    """Hash of a file, read once for all cells as long as its entry stays."""
    return hash_file(Path(file))


def _files(names: Iterable[str | None]) -> Iterator[Path]:
    """Files that are named, or in a folder that is; other names are those of a hub."""
    for path in (Path(name).expanduser() for name in dict.fromkeys(names) if name is not None):
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.is_file())
        elif path.is_file():
            yield path
