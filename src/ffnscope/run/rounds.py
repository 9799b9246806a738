"""The plans of a run, in the rounds that it asks for."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from typing import Any

from ffnscope.analyze.levels import calibrate_all
from ffnscope.analyze.question import Question
from ffnscope.apply.method import reconstruct_plan
from ffnscope.apply.rounds import RoundSteps, plan_in_rounds
from ffnscope.apply.sequential import SequentialOptions
from ffnscope.io import read_plan
from ffnscope.run.choices import core_rule, load_background, load_reference, metric_params, pass_options
from ffnscope.run.stages import Core, Job, plan_stage
from ffnscope.run.steps import discard_damaged
from ffnscope.scoring import naming_weights
from ffnscope.types import Budget, ChannelStats, FFNSite, PruningPlan, Scores

PART = ".part"
"""Ending of the folder with the finished rounds of a plan."""


def planned(job: Job, scores: Mapping[str, Scores], stats: Mapping[FFNSite, ChannelStats]) -> dict[str, PruningPlan]:
    """Build the plans of a run; an interrupted one goes on after its last finished round."""
    found = plan_stage(job, scores, partial(_plan, job, stats))
    for part in job.folder.glob(f"plans/*{PART}"):
        shutil.rmtree(part)
    return found


def _plan(
    job: Job, stats: Mapping[FFNSite, ChannelStats], label: str, scores: Scores, budget: Budget, protected: Core
) -> PruningPlan:
    method = job.config.pruning.chosen(scores.metric)
    part = job.folder / "plans" / f"{label}{PART}"
    for path in part.glob("round_*.json"):
        discard_damaged(job.reporter, path, read_plan)
    size = job.config.calibration.batch_size
    options = SequentialOptions(batch_size=size, checkpoint=part / "blocks", model_hash=job.model_hash)
    given: Any = {"windows": job.calibration, "stats": stats, "options": options}

    def again(number: int) -> Scores:
        return _scores(job, f"{label}: round {number}", scores.metric)

    steps = RoundSteps(again, lambda plan: reconstruct_plan(job.loaded.model, plan, method, **given), part, protected)
    return plan_in_rounds(job.loaded.model, scores, budget, method, steps)


def _scores(job: Job, name: str, metric: str) -> Scores:
    """Score the model as it is now with one metric of the run."""
    config, model = job.config, job.loaded.model
    params, rule, options = {metric: metric_params(config, metric)}, core_rule(config), pass_options(config)
    given: Any = {"reference": load_reference(config, params), "background": load_background(config)}
    with job.reporter.task(name, "tokens") as update, naming_weights(model):
        stats, core = calibrate_all(
            model, job.calibration, params, sites=job.sites, rule=rule, options=options, on_batch=update
        )
    return Question(model, job.sites, params, rule, **given).scores(stats, core)[metric]
