"""Run one configuration from the text to the tables."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ffnscope
from ffnscope.evaluate.compare import EvalRow
from ffnscope.ffn.load import ModelSource, load_model
from ffnscope.io import SCHEMA, write_csv, write_json, write_text
from ffnscope.report.summary import rank_correlation
from ffnscope.report.tables import results_markdown, results_rows
from ffnscope.run import stages
from ffnscope.run.folder import open_folder
from ffnscope.run.progress import Reporter, logging_to
from ffnscope.run.schema import RunConfig
from ffnscope.run.stages import Job
from ffnscope.types import FFNSite, PruningPlan, Scores


@dataclass(frozen=True, slots=True, eq=False)
class RunResult:
    """What a run made: its folder, scores per metric, plans per label, evaluation rows, generated samples."""

    folder: Path
    scores: dict[str, Scores]
    plans: dict[str, PruningPlan]
    rows: list[EvalRow]
    samples: dict[str, list[str]]


def run(config: RunConfig, *, overwrite: bool = False, reporter: Reporter | None = None) -> RunResult:
    """Run all stages of a configuration; stages whose results are present and current are not run again.

    Args:
        config: from `load_config` or `config_from_dict`.
        overwrite: bring a folder of another configuration up to date.
        reporter: where progress goes; default: the terminal's standard error.

    Raises:
        ArtifactError: the output folder holds something else.
        ConfigError, ModelError, TextError, DeviceError, NonFiniteError: see the message.
    """
    reporter = reporter or Reporter()
    folder = open_folder(config, overwrite=overwrite)
    with logging_to(folder / "run.log"):
        reporter.say(f"ffnscope {ffnscope.__version__}: {config.experiment.name} -> {folder}")
        with reporter.task(f"load {config.model.model_id}", "models"):
            loaded = load_model(model_source(config))
        job = stages.open_job(config, folder, reporter, loaded)
        stats = stages.calibrate_stage(job)
        scores = stages.score_stage(job, stats)
        plans = stages.plan_stage(job, scores)
        rows = stages.evaluate_stage(job, plans)
        samples = stages.samples_stage(job, plans)
        _report(job, scores, rows)
        write_json(folder / "summary.json", summary(job, plans, rows))
        reporter.say(f"results in {folder}")
    return RunResult(folder, scores, plans, rows, samples)


def model_source(config: RunConfig) -> ModelSource:
    """Translate the YAML's model block for the loader."""
    asked = config.model
    return ModelSource(
        asked.model_id,
        asked.revision,
        asked.dtype,
        config.experiment.device,
        asked.device_map,
        asked.trust_remote_code,
        dict(asked.model_kwargs),
        dict(asked.tokenizer_kwargs),
    )


def summary(job: Job, plans: Mapping[str, PruningPlan], rows: list[EvalRow]) -> dict[str, Any]:
    """Collect what a reader of the results must know: versions, model, texts, seeds, timings, memory, results."""
    import transformers

    model: Any = job.loaded.model
    parameters = list(model.parameters())
    return {
        "schema": SCHEMA,
        "name": job.config.experiment.name,
        "versions": {
            "ffnscope": ffnscope.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": {
            "model_id": job.config.model.model_id,
            "class": type(model).__name__,
            "revision": getattr(model.config, "_commit_hash", None) or job.config.model.revision,
            "weights_hash": job.model_hash,
            "parameters": sum(p.numel() for p in parameters),
            "ffn_parameters_per_channel": _channel_parameters(job.sites),
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
            "device": str(parameters[0].device),
            "sites": [asdict(s) for s in job.sites],
        },
        "texts": job.texts,
        "seeds": {"experiment": job.config.experiment.seed, "calibration": job.config.seed},
        "stages": {
            name: {k: v for k, v in row.items() if k in ("seconds", "peak_memory_bytes")}
            for name, row in job.ledger.stages.items()
        },
        "plans": {label: {"sparsity": plan.sparsity, "metric": plan.metric} for label, plan in plans.items()},
        "results": results_rows(rows),
    }


def _channel_parameters(sites: list[FFNSite]) -> int:
    """Weights that one channel of the first site is made of: rows of gate and up, and a column of down."""
    site = sites[0]
    return site.d_model * (2 if site.gate is None else 3)


def _report(job: Job, scores: Mapping[str, Scores], rows: list[EvalRow]) -> None:
    """Write tables and plots: ``pruning_results.json``/``.csv``, ``results.md``, ``plots/``."""
    tables = [job.folder / name for name in ("pruning_results.json", "pruning_results.csv", "results.md")]
    plots = _plot_files(job, scores, rows)
    flat = results_rows(rows)

    def make() -> None:
        if rows:
            write_json(tables[0], {"rows": flat})
            write_csv(tables[1], flat)
            write_text(tables[2], f"# {job.config.experiment.name}\n\n{results_markdown(rows)}")
        if plots:
            with job.reporter.task("plots", "files") as update:
                _draw(job, scores, rows, plots)
                update(len(plots), len(plots))

    files = [*(tables if rows else ()), *plots.values()]
    job.stage("report", [job.keys["score"], flat, sorted(plots)], files, make)


def _plot_files(job: Job, scores: Mapping[str, Scores], rows: list[EvalRow]) -> dict[str, Path]:
    if not job.config.output.plots:
        return {}
    names = ["heatmap", *(f"scores_{metric}" for metric in scores)]
    names += ["rank_correlation"] if len(scores) > 1 else []
    names += ["perplexity"] if len(rows) > 1 else []
    return {name: job.folder / "plots" / f"{name}.png" for name in names}


def _draw(job: Job, scores: Mapping[str, Scores], rows: list[EvalRow], files: Mapping[str, Path]) -> None:
    from ffnscope.report import plots

    text = job.texts["calibration"]
    title = f"{job.config.model.model_id}, {text['tokens']:,} tokens of {text['text']}"
    core: Mapping[FFNSite, Tensor] | None = stages.find_core(job.config, scores)
    plots.plot_heatmap(scores, files["heatmap"], title)
    for metric, one in scores.items():
        plots.plot_score_distributions(one, files[f"scores_{metric}"], core, title)
    if "rank_correlation" in files:
        plots.plot_rank_correlation(*rank_correlation(scores), files["rank_correlation"], title)
    if "perplexity" in files:
        plots.plot_perplexity(rows, files["perplexity"], job.config.model.model_id)
