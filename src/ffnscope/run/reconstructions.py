"""The stage of a run that reconstructs its plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ffnscope.apply.method import Method, reconstruct_plan
from ffnscope.apply.pruned import Pruned
from ffnscope.apply.reconstruction import check_linear, read_reconstruction
from ffnscope.apply.sequential import SequentialOptions
from ffnscope.io import write_json
from ffnscope.run.schema import RunConfig
from ffnscope.run.stages import RECONSTRUCT, Job
from ffnscope.run.steps import keep_reconstruction
from ffnscope.types import ChannelStats, FFNSite, PruningPlan

FOLDER = "reconstructions"
Stats = Mapping[FFNSite, ChannelStats]


def check_sites(config: RunConfig, sites: Sequence[FFNSite]) -> None:
    """Raise NotAvailableError when an FFN cannot be reconstructed as the configuration asks, before any work."""
    if config.pruning.reconstructs:
        check_linear(sites)


def reconstruct_stage(job: Job, plans: Mapping[str, PruningPlan], stats: Stats) -> dict[str, Pruned]:
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
        job.stage(f"{RECONSTRUCT}{label}", depends, files, partial(_make, job, plan, method, stats, files))
        found[label] = read_reconstruction(path)
    return found


def _make(job: Job, plan: PruningPlan, method: Method, stats: Stats, files: Sequence[Path]) -> None:
    blocks = files[0].with_suffix(".part")
    size = job.config.calibration.batch_size
    options = SequentialOptions(batch_size=size, checkpoint=blocks, model_hash=job.model_hash)
    make = partial(reconstruct_plan, job.loaded.model, plan, method, windows=job.calibration, stats=stats)
    made = keep_reconstruction(job.reporter, f"{RECONSTRUCT}{files[0].stem}", files[0], options, make)
    write_json(files[1], {"name": made.name, "rows": made.error_profile()})
