"""The stage of a run that reconstructs its plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ffnscope.apply.held_out import FitStatistics
from ffnscope.apply.method import Method, reconstruct_plan
from ffnscope.apply.pruned import Pruned
from ffnscope.apply.reconstruction import read_reconstruction
from ffnscope.apply.sequential import SequentialOptions
from ffnscope.io import read_json, write_json
from ffnscope.plan.allocate import check_budget
from ffnscope.run.analyses import tables, write_tables
from ffnscope.run.schema import RunConfig
from ffnscope.run.stages import RECONSTRUCT, Job
from ffnscope.run.steps import announce_training, keep_reconstruction
from ffnscope.types import FFNSite, PruningPlan

FOLDER = "reconstructions"


def check_sites(config: RunConfig, sites: Sequence[FFNSite]) -> None:
    """Raise before any work when an FFN cannot be reconstructed as the configuration asks, or a budget not be met.

    Raises:
        NotAvailableError: see `Method.check_sites`.
        UsageError: see `check_budget`.
    """
    if config.pruning.reconstructs:
        config.pruning.chosen(config.pruning.algorithms[0]).check_sites(sites)
    for ratio in config.pruning.ratios if config.pruning.enabled else ():
        check_budget(sites, config.pruning.budget(ratio), config.pruning.allocator)


def reconstruct_stage(job: Job, plans: Mapping[str, PruningPlan], stats: FitStatistics) -> dict[str, Pruned]:
    """Reconstruct every plan on the calibration text: ``reconstructions/LABEL.safetensors``, errors in ``LABEL.json``.

    Without a reconstruction, the plans. An interrupted sequential one goes on after its last finished block.
    """
    asked = job.config.pruning
    if not asked.reconstructs:
        return dict(plans)
    found: dict[str, Pruned] = {}
    for label, plan in plans.items():
        method = asked.chosen(plan.metric)
        path = job.folder / FOLDER / f"{label}.safetensors"
        files = [path, path.with_suffix(".json")]
        depends = [job.model_hash, job.keys["plan"], label, job.calibration.hash, asdict(method)]
        depends += [job.keys["calibrate"]] if method.statistics else []
        depends += [job.keys["calibrate held out"]] if stats.held_out is not None else []
        job.stage(f"{RECONSTRUCT}{label}", depends, files, partial(_make, job, plan, method, stats, files))
        found[label] = read_reconstruction(path)
    _profile_stage(job, list(plans))
    return found


def _profile_stage(job: Job, labels: Sequence[str]) -> None:
    """The errors of all reconstructions in one table: ``analysis/error_profile.csv`` and ``.json``."""
    layers = {site.name: site.layer for site in job.sites}
    told = {label: read_json(job.folder / FOLDER / f"{label}.json")["rows"] for label in labels}
    rows = [{"label": label, "layer": layers[r["site"]], **r} for label, one in told.items() for r in one]
    if rows:
        files = tables(job, "error_profile")
        depends = [job.keys[f"{RECONSTRUCT}{label}"] for label in labels]
        job.stage("error profile", depends, files, lambda: write_tables(files, rows, {}))


def _make(job: Job, plan: PruningPlan, method: Method, stats: FitStatistics, files: Sequence[Path]) -> None:
    blocks = files[0].with_suffix(".part")
    size = job.config.calibration.batch_size
    options = SequentialOptions(batch_size=size, checkpoint=blocks, model_hash=job.model_hash)
    announce_training(job.reporter, job.loaded.model, method, plan, job.calibration)
    make = partial(reconstruct_plan, job.loaded.model, plan, method, windows=job.calibration, stats=stats)
    name = f"{RECONSTRUCT}{files[0].stem}"
    made = keep_reconstruction(job.reporter, name, files[0], options, make, method.steps)
    write_json(files[1], {"name": made.name, "rows": made.error_profile()})
