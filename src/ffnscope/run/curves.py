"""The stages of a run that measure loss curves, and tell which widths were chosen by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from ffnscope.analyze.measured import measure_round, solve_in_rounds
from ffnscope.io import plan_to_dict, read_json, read_state, write_csv
from ffnscope.plan.curves import Curves, read_curves, write_curves
from ffnscope.run.analyses import calibrated_keys, tables, write_tables
from ffnscope.run.stages import CURVES, Job, make_plan, plan_labels
from ffnscope.run.steps import discard_damaged
from ffnscope.saving import writing
from ffnscope.types import ChannelStats, FFNSite, PruningPlan, Scores

FOLDER = "curves"
CHOSEN = "chosen widths"
Stats = Mapping[FFNSite, ChannelStats]


def curves_stage(job: Job, stats: Stats, scores: Mapping[str, Scores]) -> dict[str, Curves]:
    """Measure for every plan: ``curves/METRIC.safetensors`` and ``.csv``, and for later rounds ``LABEL_2`` and so on.

    Returns the curves of the last round by label; none where the allocator reads none. The first round serves all
    sparsities of a metric. An interrupted round goes on.
    """
    asked = job.config.pruning
    if not asked.measures:
        return {}
    found: dict[str, Curves] = {}
    for label, (metric, _) in plan_labels(job.config).items():
        refit = stats if asked.chosen(metric).curve_statistics else None
        measure = partial(_measured, job, refit, scores[metric], label)
        make = partial(make_plan, job, scores, label)
        found[label] = solve_in_rounds(measure, make, asked.curves.rounds)[1][-1]
    return found


def _measured(
    job: Job, stats: Stats | None, scores: Scores, label: str, number: int, plan: PruningPlan | None
) -> Curves:
    """One round: the stage that measures it, or its file."""
    name = scores.metric if plan is None else f"{label}_{number}"
    path = job.folder / FOLDER / f"{name}.safetensors"
    files = [path, path.with_suffix(".csv")]
    rounds = job.config.pruning.curve_rounds(job.config.calibration.batch_size)
    windows = rounds.windows(job.calibration)
    around = None if plan is None else plan_to_dict(plan)
    depends = [job.keys["score"], windows.hash, rounds.options.shares, around]
    depends += calibrated_keys(job) if stats is not None else []

    def make() -> None:
        part = path.with_suffix(".part.json")
        discard_damaged(job.reporter, part, read_state)
        options = replace(rounds.options, checkpoint=part)
        with job.reporter.task(f"{CURVES}{name}", "cuts") as update:
            made = measure_round(job.loaded.model, scores, stats, windows, plan, options=options, on_cut=update)
        write_curves(files[0], made)
        write_csv(files[1], made.rows())
        with writing(part):
            part.unlink(missing_ok=True)

    if f"{CURVES}{name}" not in job.keys:
        job.stage(f"{CURVES}{name}", depends, files, make)
    return read_curves(path)


def chosen_stage(job: Job, curves: Mapping[str, Curves], plans: Mapping[str, PruningPlan]) -> None:
    """Tell the last curves of every plan with the widths that it chose: ``analysis/curves.csv`` and ``.json``."""
    if not curves:
        return
    files = tables(job, FOLDER)

    def make() -> None:
        rows = [{"label": label, **row} for label, one in curves.items() for row in one.rows(plans[label])]
        first: Curves = next(iter(curves.values()))
        write_tables(files, rows, {"unit": first.unit, **first.facts})

    job.stage(CHOSEN, [job.keys["plan"]], files, make)


def curve_rows(folder: Path) -> dict[str, list[dict[str, object]]]:
    """What `chosen_stage` wrote, by label."""
    found: dict[str, list[dict[str, object]]] = {}
    for row in read_json(folder / "analysis" / f"{FOLDER}.json")["rows"]:
        found.setdefault(row["label"], []).append(row)
    return found
