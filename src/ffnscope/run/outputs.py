"""What a run writes for its readers: tables, plots, and the summary of what was done with what."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import ffnscope
from ffnscope.apply.pruned import Pruned, plan_of
from ffnscope.apply.reconstruction import Reconstruction
from ffnscope.errors import UsageError
from ffnscope.evaluate.compare import EvalRow
from ffnscope.evaluate.costs import channel_parameters
from ffnscope.evaluate.tasks import TaskRow
from ffnscope.ffn.offload import placement
from ffnscope.io import SCHEMA, hash_file, write_csv, write_json, write_text
from ffnscope.report.page import write_report
from ffnscope.report.run_folder import read_run, result_files
from ffnscope.report.summary import rank_correlation
from ffnscope.report.tables import results_markdown, results_rows
from ffnscope.report.task_table import tasks_markdown
from ffnscope.run.choices import find_core
from ffnscope.run.curves import CHOSEN, curve_rows
from ffnscope.run.folder import write_if_changed
from ffnscope.run.schema import RunConfig
from ffnscope.run.stages import Job
from ffnscope.run.windows import describe_windows
from ffnscope.types import FFNSite, Scores

PAGE = "report.html"
PAGE_STAGE = "page"


def check_plots(config: RunConfig) -> None:
    """Raise UsageError when plots are asked for and cannot be drawn: at the start, not after all the work."""
    if (config.output.plots or config.output.report) and importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "output.plots and output.report need matplotlib, which is not installed: pip install 'ffnscope[plots]', or "
            "set output.plots: false and output.report: false."
        )


def report_stage(
    job: Job, scores: Mapping[str, Scores], rows: Sequence[EvalRow], tasks: Sequence[TaskRow] = ()
) -> None:
    """Write tables and plots: ``pruning_results`` and ``tasks`` as JSON and CSV, ``results.md``, ``plots/``."""
    names = ("pruning_results.json", "pruning_results.csv", "results.md") if rows else ()
    names += ("tasks.json", "tasks.csv") if tasks else ()
    tables = [job.folder / name for name in names]
    plots = _plot_files(job, scores, rows)
    flat, task_rows = results_rows(rows), [row.as_dict() for row in tasks]

    def make() -> None:
        if tables:
            write_json(tables[0], {"rows": flat})
            write_csv(tables[1], flat)
            found = results_markdown(rows) + (f"\n{tasks_markdown(tasks)}" if tasks else "")
            write_text(tables[2], f"# {job.config.experiment.name}\n\n{found}")
        if tasks:
            write_json(tables[3], {"rows": task_rows})
            write_csv(tables[4], task_rows)
        if plots:
            with job.reporter.task("plots", "files"):
                _draw(job, scores, rows, plots)

    shown = [job.config.experiment.name, job.config.model.model_id, job.config.supernode.model_dump()]
    depends = [job.keys["score"], flat, task_rows, sorted(plots), shown]
    depends += [job.keys[CHOSEN]] if CHOSEN in job.keys else []
    job.stage("report", depends, [*tables, *plots.values()], make)


def page_stage(job: Job, made: Mapping[str, Any]) -> None:
    """Write ``summary.json`` and, where it is asked for, ``report.html``: of the folder's files alone."""
    job.ledger.keep([*job.keys, *([PAGE_STAGE] if job.config.output.report else [])])
    path = job.folder / "summary.json"
    there = path.exists()
    if write_if_changed(path, made) and there and not job.made:
        job.reporter.say(f"{path} was damaged or changed, and is written again: all results are those it is made from")
    if not job.config.output.report:
        return
    path = job.folder / PAGE
    files = {path.relative_to(job.folder).as_posix(): hash_file(path) for path in result_files(job.folder)}

    def make() -> None:
        with job.reporter.task("report", "pages"):
            write_report(read_run(job.folder), path)

    job.stage(PAGE_STAGE, files, [path], make)


def summary(
    job: Job, pruned: Mapping[str, Pruned], rows: Sequence[EvalRow], tasks: Sequence[TaskRow] = ()
) -> dict[str, Any]:
    """Collect what a reader of the results must know: versions, model, texts, seeds, timings, memory, results."""
    held_out = {f"evaluation_{i}": describe_windows(windows) for i, windows in enumerate(job.held_out)}
    return {
        "schema": SCHEMA,
        "name": job.config.experiment.name,
        "versions": versions(),
        "model": _model(job),
        "texts": {"calibration": describe_windows(job.calibration), **held_out},
        "seeds": {"experiment": job.config.experiment.seed, "calibration": job.config.seed},
        "stages": {
            name: {k: v for k, v in job.ledger.stages[name].items() if k in ("seconds", "peak_memory_bytes")}
            for name in job.keys
        },
        "plans": {label: _plan(one) for label, one in pruned.items()},
        "results": results_rows(rows),
        "tasks": [row.as_dict() for row in tasks],
    }


def _plan(pruned: Pruned) -> dict[str, Any]:
    plan = plan_of(pruned)
    told: dict[str, Any] = {"sparsity": plan.sparsity, "metric": plan.metric}
    return {**told, "reconstruction": pruned.name} if isinstance(pruned, Reconstruction) else told


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import transformers

    return {
        "ffnscope": ffnscope.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _model(job: Job) -> dict[str, Any]:
    model: Any = job.loaded.model
    parameters = list(model.parameters())
    return {
        "model_id": job.config.model.model_id,
        "class": type(model).__name__,
        "revision": job.loaded.revision,
        "weights_hash": job.model_hash,
        "parameters": sum(p.numel() for p in parameters),
        "ffn_parameters_per_channel": _channel_parameters(model, job.sites[0]),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "device": placement(model),
        "sites": [asdict(s) for s in job.sites],
    }


def _channel_parameters(model: Any, site: FFNSite) -> int:
    """Weights that one channel is made of: its rows of gate and up, and its column of down; all of a special site."""
    if site.norm is not None or site.adapters:
        return channel_parameters(model, site)
    return site.d_model * (2 if site.gate is None else 3)


def _plot_files(job: Job, scores: Mapping[str, Scores], rows: Sequence[EvalRow]) -> dict[str, Path]:
    if not job.config.output.plots:
        return {}
    names = ["heatmap", *(f"scores_{metric}" for metric in scores)] if scores else []
    names += ["rank_correlation"] if len(scores) > 1 else []
    names += ["perplexity"] if any(row.metric for row in rows) else []
    names += [f"curves_{label}" for label in curve_rows(job.folder)] if CHOSEN in job.keys else []
    return {name: job.folder / "plots" / f"{name}.png" for name in names}


def _draw(job: Job, scores: Mapping[str, Scores], rows: Sequence[EvalRow], files: Mapping[str, Path]) -> None:
    from ffnscope.report import plots
    from ffnscope.report.curve_plots import plot_curves

    title = f"{job.config.model.model_id}, {job.calibration.n_tokens:,} tokens of {job.calibration.source}"
    core = find_core(job.config, scores)
    if "heatmap" in files:
        plots.plot_heatmap(scores, files["heatmap"], title)
    for metric, one in scores.items():
        plots.plot_score_distributions(one, files[f"scores_{metric}"], core, title)
    if "rank_correlation" in files:
        plots.plot_rank_correlation(*rank_correlation(scores), files["rank_correlation"], title)
    if "perplexity" in files:
        plots.plot_perplexity(rows, files["perplexity"], job.config.model.model_id)
    for label, measured in curve_rows(job.folder).items() if CHOSEN in job.keys else ():
        plot_curves(measured, files[f"curves_{label}"], f"{label}, {job.config.model.model_id}")
