"""Run one configuration from the text to the tables."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ffnscope
from ffnscope.apply.reconstruction import Reconstruction
from ffnscope.display import html_table
from ffnscope.evaluate.compare import EvalRow
from ffnscope.evaluate.tasks import TaskRow
from ffnscope.ffn.load import load_model
from ffnscope.ffn.sites import find_sites
from ffnscope.ffn.streamed import wait_in
from ffnscope.report.tables import results_columns, results_frame
from ffnscope.run import stages
from ffnscope.run.ablations import ablation_stage
from ffnscope.run.analyses import analyses_stage, protection_stage
from ffnscope.run.checkpoints import check_format, checkpoints_stage
from ffnscope.run.choices import model_source
from ffnscope.run.contextual import card_summary, contextual_stage, open_card
from ffnscope.run.curves import chosen_stage, curves_stage
from ffnscope.run.folder import LOG_FILE, open_folder
from ffnscope.run.outputs import check_plots, page_stage, report_stage, summary
from ffnscope.run.progress import Reporter, logging_to
from ffnscope.run.reconstructions import check_sites, reconstruct_stage
from ffnscope.run.rounds import planned
from ffnscope.run.schema import RunConfig
from ffnscope.run.windows import check_texts
from ffnscope.sparse.card import SparsityCard
from ffnscope.sparse.evaluation import FormRow
from ffnscope.types import PruningPlan, Scores


@dataclass(frozen=True, slots=True, eq=False)
class RunResult:
    """What a run made: its folder, scores per metric, plans per label, rows of evaluation and tasks, samples.

    ``reconstructions`` are those of the plans, by label, where the configuration asks for them; ``card`` is its
    contextual sparsity, and ``card_curve`` the perplexities around it.
    """

    folder: Path
    scores: dict[str, Scores]
    plans: dict[str, PruningPlan]
    rows: list[EvalRow]
    samples: dict[str, list[str]]
    tasks: list[TaskRow] = field(default_factory=list[TaskRow])
    reconstructions: dict[str, Reconstruction] = field(default_factory=dict[str, Reconstruction])
    card: SparsityCard | None = None
    card_curve: list[FormRow] = field(default_factory=list[FormRow])

    def to_pandas(self) -> Any:
        """One row per model and text of the evaluation, with the columns of ``pruning_results.csv``."""
        return results_frame(self.rows)

    def _repr_html_(self) -> str:
        """Folder and evaluation, for notebooks."""
        shown = ("label", "dataset", "sparsity", "perplexity", "perplexity_stderr", "kl_to_dense", "top1_agreement")
        columns = results_columns(self.rows)
        table = html_table({name: columns[name] for name in shown}) if self.rows else ""
        made = f"{len(self.scores)} metric(s), {len(self.plans)} plan(s) in {self.folder}"
        return f"<p><b>{html.escape(made)}</b></p>{table}"


def run(config: RunConfig, *, overwrite: bool = False, reporter: Reporter | None = None) -> RunResult:
    """Run all stages of a configuration; stages whose results are present and current are not run again.

    Args:
        config: from `load_config` or `config_from_dict`.
        overwrite: bring a folder of another configuration up to date; what it no longer asks for is deleted.
        reporter: where progress goes; default: the terminal's standard error.

    Raises:
        ArtifactError: the output folder holds something else, is in use, or cannot be written.
        ModelError, TextError, UsageError, DeviceError, NonFiniteError: see the message.
    """
    reporter = reporter or Reporter()
    check_plots(config)
    check_texts(config)
    with open_folder(config, overwrite=overwrite) as folder, logging_to(folder / LOG_FILE):
        reporter.say(f"ffnscope {ffnscope.__version__}: {config.experiment.name} -> {folder}")
        with reporter.task(f"load {config.model.model_id}", "models"):
            loaded = load_model(model_source(config))
        wait_in(loaded.model, folder)
        check_format(config, loaded)
        check_sites(config, find_sites(loaded.model, config.model.tracked_layers))
        job = stages.open_job(config, folder, reporter, loaded, overwrite=overwrite)
        config = job.config
        asked = open_card(config, loaded, job.sites, job.calibration, job.model_hash)
        stats = stages.calibrate_stage(job)
        scores = stages.score_stage(job, stats)
        analyses_stage(job, stats, scores)
        curves = curves_stage(job, stats, scores)
        fit = stages.held_out_stage(job, stats)
        plans = planned(job, scores, fit, curves)
        chosen_stage(job, curves, plans)
        pruned = reconstruct_stage(job, plans, fit)
        rows = stages.evaluate_stage(job, pruned)
        protection_stage(job, pruned)
        ablation_stage(job, stats, scores)
        tasks = stages.tasks_stage(job, pruned)
        samples = stages.samples_stage(job, pruned)
        card, curve = contextual_stage(job, asked)
        report_stage(job, scores, rows, tasks)
        checkpoints_stage(job, pruned, rows)
        told = {"contextual": card_summary(card, curve)} if card else {}
        page_stage(job, {**summary(job, pruned, rows, tasks), **told})
        reporter.say(f"results in {folder}")
    refits = {label: one for label, one in pruned.items() if isinstance(one, Reconstruction)}
    return RunResult(folder, scores, plans, rows, samples, tasks, refits, card, curve)
