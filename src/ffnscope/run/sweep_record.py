"""What a sweep has done so far: which cells are finished, from what, and which failed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ffnscope
from ffnscope.errors import ArtifactError
from ffnscope.io import SCHEMA, disposable, expect_kind, hash_json, read_json, write_json
from ffnscope.report.run_folder import read_run
from ffnscope.report.sweep_page import CellResult
from ffnscope.run.folder import CONFIG, LEDGER
from ffnscope.run.ledger import Ledger
from ffnscope.run.load import dump_config
from ffnscope.run.schema import RunConfig
from ffnscope.run.sweep_cells import Cell, SweepConfig

RECORD = "sweep.json"


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
        """Cells to run, those that were never begun first."""
        found = [cell for cell in self._sweep.cells if not self._is_finished(cell)]
        return sorted(found, key=lambda cell: (cell.config.output_dir / CONFIG).exists())

    def state(self, cell: Cell) -> str:
        """An unfinished cell in a word."""
        if self._cells.get(cell.name, {}).get("error"):
            return "failed"
        return "begun" if (cell.config.output_dir / CONFIG).exists() else "new"

    def note(self, cell: Cell, error: str | None) -> None:
        """Record how a cell ended."""
        made_from = None if error else _made_from(cell.config)
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
        """Every cell with what it left."""
        found: list[CellResult] = []
        for cell in self._sweep.cells:
            row = self._cells.get(cell.name, {})
            run = read_run(cell.config.output_dir) if row.get("made_from") else None
            found.append(CellResult(cell.name, cell.labels, run, row.get("error")))
        return found

    def _is_finished(self, cell: Cell) -> bool:
        recorded = self._cells.get(cell.name, {}).get("made_from")
        try:
            return recorded == _made_from(cell.config) and Ledger(cell.config.output_dir).intact
        except ArtifactError:  # no ledger, or a damaged one, of which the run tells
            return False


def _made_from(config: RunConfig) -> str:
    """Hash of configuration, version, the run's own ledger, and size and time of every local file that it reads.

    A cell for which it is unchanged is not opened again. When it has changed, the run itself looks at weights and text,
    stage by stage. A model or dataset of the hub is taken to be what it was; ``revision`` makes sure.
    """
    stages = read_json(config.output_dir / LEDGER)
    return hash_json([ffnscope.__version__, dump_config(config), stages, list(_stamps(config))])


def _stamps(config: RunConfig) -> Iterator[list[Any]]:
    texts = (config.dataset, *config.mixed_texts, *config.evaluation_texts, *config.stability_texts)
    named = [config.model.model_id, config.model.reference_id, config.metrics.background, *(t.name for t in texts)]
    for path in (Path(name).expanduser() for name in dict.fromkeys(named) if name is not None):
        if path.exists():
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                found = file.stat()
                yield [str(file), found.st_size, found.st_mtime_ns]
