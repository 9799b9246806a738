"""The plans of a run, in the rounds that it asks for."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from ffnscope.analyze.levels import calibrate_all
from ffnscope.analyze.question import Question
from ffnscope.apply.held_out import FitStatistics
from ffnscope.apply.method import reconstruct_plan
from ffnscope.apply.pruned import Pruned
from ffnscope.apply.rounds import RoundSteps, plan_in_rounds, read_round
from ffnscope.apply.sequential import SequentialOptions
from ffnscope.plan.curves import Curves
from ffnscope.run.choices import core_rule, load_background, load_reference, metric_params, pass_options
from ffnscope.run.stages import Job, make_plan, plan_request, plan_stage
from ffnscope.run.steps import discard_damaged
from ffnscope.scoring import naming_weights
from ffnscope.types import PruningPlan, Scores

PART = ".part"
"""Ending of the folder with the finished rounds of a plan."""


def planned(
    job: Job,
    scores: Mapping[str, Scores],
    stats: FitStatistics,
    curves: Mapping[str, Curves],
) -> dict[str, PruningPlan]:
    """Build the plans of a run, by curves or in rounds; an interrupted one goes on after its last finished round."""

    def plan_of(label: str) -> PruningPlan:
        if job.config.pruning.rounds == 1:
            return make_plan(job, scores, label, curves.get(label))
        return _in_rounds(job, stats, label, scores)

    found = plan_stage(job, plan_of)
    for part in job.folder.glob(f"plans/*{PART}"):
        shutil.rmtree(part)
    return found


def _in_rounds(job: Job, stats: FitStatistics, label: str, scores: Mapping[str, Scores]) -> PruningPlan:
    one, budget, protected = plan_request(job, scores, label)
    method = job.config.pruning.chosen(one.metric)
    part = job.folder / "plans" / f"{label}{PART}"
    for path in part.glob("round_*.json"):
        discard_damaged(job.reporter, path, read_round)
    size = job.config.calibration.batch_size
    options = SequentialOptions(batch_size=size, checkpoint=part / "blocks", model_hash=job.model_hash)
    given: Any = {"windows": job.calibration, "stats": stats, "options": options}

    def again(number: int) -> Scores:
        return _scores(job, f"{label}: round {number}", one.metric)

    def refit(plan: PruningPlan) -> Pruned:
        return reconstruct_plan(job.loaded.model, plan, method.untrained, **given)

    return plan_in_rounds(job.loaded.model, one, budget, method, RoundSteps(again, refit, part, protected))


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
