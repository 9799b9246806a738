"""Several runs beside each other: what differs in what was asked, their perplexities, tasks, and rankings."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from ffnscope.analyze.agreement import agreement
from ffnscope.errors import UsageError
from ffnscope.evaluate.compare import EvalRow
from ffnscope.report import plots
from ffnscope.report.figures import PageFigure
from ffnscope.report.findings import caveats, findings
from ffnscope.report.inline_svg import inline_svg
from ffnscope.report.page import Part, flat_config, run_parts, write_page
from ffnscope.report.run_folder import RunFolder
from ffnscope.report.tables import BLANK, Cell, Grid, number, results_grids, results_rows
from ffnscope.report.task_table import task_grid

MOST_SETTINGS = 60
WIDEST = 36  # characters of a line of a setting


def labelled(runs: Sequence[RunFolder]) -> dict[str, RunFolder]:
    """Runs by a label: their name, after as much of their folder as tells them apart.

    Raises:
        UsageError: fewer than two runs, or one folder twice.
    """
    folders = [run.folder.resolve() for run in runs]
    if len(set(folders)) < max(2, len(folders)):
        raise UsageError("a comparison needs at least two runs, each folder once.")
    names = [run.name for run in runs]
    return {run.name if names.count(run.name) == 1 else str(run.folder): run for run in runs}


def comparison_grids(runs: Mapping[str, RunFolder]) -> list[Grid]:
    """Tables of the runs side by side: settings that differ, perplexities, tasks, agreement of the same metrics."""
    tasks = [{**row, "label": f"{name}: {row['label']}"} for name, run in runs.items() for row in run.tasks]
    found = [*_settings(runs), *compared_grids(runs)]
    return [*found, *([task_grid(tasks)] if tasks else []), *agreement_grids(runs)]


def comparison_rows(runs: Mapping[str, RunFolder]) -> list[dict[str, Any]]:
    """Flat rows for CSV and JSON: one per run, model and text."""
    return [{"run": name, **row} for name, run in runs.items() for row in results_rows(run.rows)]


def write_comparison(runs: Mapping[str, RunFolder], path: Path) -> Path:
    """Write one page: the comparison, then the report of each run; returns ``path``.

    Raises:
        UsageError: matplotlib is not installed.
        ArtifactError: the file cannot be written.
    """
    parts = [Part("compared", "Side by side", grids=comparison_grids(runs), figures=compared_figures(runs))]
    for index, (name, run) in enumerate(runs.items()):
        own = [part for part in run_parts(run, f"r{index}f") if part.id not in ("found", "limits")]
        parts.append(Part(f"r{index}-found", name, [*findings(run), *caveats(run)]))
        parts += [replace(part, id=f"r{index}-{part.id}", heading=f"{name}: {part.heading}") for part in own]
    return write_page(path, "Comparison of " + ", ".join(runs), f"{len(runs)} runs", parts)


def compared_figures(runs: Mapping[str, RunFolder]) -> list[PageFigure]:
    """Draw the perplexities of all runs in one figure; none where nothing was pruned."""
    rows = compared_rows(runs)
    if not any(row.metric for row in rows):
        return []
    caption = "Perplexity against the share of channels removed, one line per run and metric."
    return [PageFigure("compared", caption, inline_svg(plots.draw_perplexity(rows), "compared", caption))]


def compared_rows(runs: Mapping[str, RunFolder]) -> list[EvalRow]:
    """Rows of all runs, labels and metrics named after their run; equal numbers of a dense model are one row."""
    found: list[EvalRow] = []
    seen: set[tuple[str, str, Any]] = set()
    for name, run in runs.items():
        for row in run.rows:
            if row.metric is not None:
                found.append(replace(row, label=f"{name}: {row.label}", metric=f"{name}: {row.metric}"))
            elif (key := (_model(run)[1], row.dataset, row.results)) not in seen:
                seen.add(key)
                found.append(replace(row, label=f"{name}: {row.label}"))
    return found


def compared_grids(runs: Mapping[str, RunFolder]) -> list[Grid]:
    """Tables of the perplexities of runs side by side; of each model apart, since it has its own lowest one."""
    by_model: dict[tuple[str, str], dict[str, RunFolder]] = {}
    for name, run in runs.items():
        by_model.setdefault(_model(run), {})[name] = run
    found: list[Grid] = []
    for (model_id, weights), part in by_model.items():
        same = sum(other == model_id for other, _ in by_model) > 1
        what = f"{model_id} ({weights[:8]}): " if same else f"{model_id}: "
        grids = results_grids(compared_rows(part))
        found += [grid._replace(title=what + grid.title) for grid in grids] if len(by_model) > 1 else grids
    return found


def _model(run: RunFolder) -> tuple[str, str]:
    """Name and hash of the model of a run."""
    return str(run.summary["model"]["model_id"]), str(run.summary["model"]["weights_hash"])


def _settings(runs: Mapping[str, RunFolder]) -> Iterator[Grid]:
    asked = {name: dict(flat_config(run.config)) for name, run in runs.items()}
    keys = [k for k in dict.fromkeys(k for one in asked.values() for k in one) if k != "output.dir"]
    unlike = [k for k in keys if len({one.get(k) for one in asked.values()}) > 1]
    if unlike:
        lines = [
            [Cell(k), *(Cell(_wrapped(one.get(k, BLANK))) for one in asked.values())] for k in unlike[:MOST_SETTINGS]
        ]
        notes = [f"and {len(unlike) - MOST_SETTINGS} more"] if len(unlike) > MOST_SETTINGS else []
        yield Grid("What was asked otherwise", ["setting", *asked], lines, notes)


def _wrapped(text: str) -> str:
    """Long lists in several lines, so that those of all runs are in sight."""
    return "\n".join(textwrap.wrap(text, WIDEST, break_long_words=False)) or text


def agreement_grids(runs: Mapping[str, RunFolder]) -> Iterator[Grid]:
    """Compare the rankings of every pair of runs by the metrics that both have."""
    lines: list[list[Cell]] = []
    for (a, first), (b, second) in combinations(runs.items(), 2):
        for metric in (m for m in first.scores if m in second.scores):
            one, other = first.scores[metric], second.scores[metric]
            if one.values.keys() == other.values.keys():
                found = agreement(one, other)
                rank = BLANK if found.spearman is None else number(found.spearman)
                lines.append([Cell(metric), Cell(a), Cell(b), Cell(rank), Cell(number(found.jaccard))])
    if lines:
        columns = ["metric", "run", "and run", "Spearman, mean over FFNs", "Jaccard of the top 1 %"]
        yield Grid("Do the runs rank channels alike?", columns, lines, [])
