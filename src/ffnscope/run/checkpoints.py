"""The last stage of a run: every plan as a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ffnscope.apply.new_bias import check_bias
from ffnscope.apply.pruned import Pruned, plan_of
from ffnscope.evaluate.compare import EvalRow
from ffnscope.ffn.load import LoadedModel, load_model
from ffnscope.ffn.sites import find_sites
from ffnscope.report.tables import results_rows
from ffnscope.run.choices import model_source
from ffnscope.run.saving import Saving
from ffnscope.run.schema import RunConfig
from ffnscope.run.stages import Job
from ffnscope.types import EvalResult

FOLDER = "checkpoints"


def check_format(config: RunConfig, loaded: LoadedModel) -> None:
    """Raise NotAvailableError when the checkpoints that a configuration asks for cannot hold this model."""
    if config.output.checkpoints:
        _saving(config, Path(FOLDER)).check_model(loaded)
        if config.pruning.reconstruct == "bias":
            check_bias(loaded.model, find_sites(loaded.model, config.model.tracked_layers))


def checkpoints_stage(job: Job, plans: Mapping[str, Pruned], rows: Sequence[EvalRow]) -> None:
    """Save ``checkpoints/METRIC-SPARSITY`` for every plan.

    Slicing changes a model for good, so each is loaded again, on the CPU. One that is streamed or placed by a
    ``device_map`` is written block by block from where it is; where that cannot be, it is loaded again as it was.
    """
    config = job.config
    if not config.output.checkpoints:
        return
    suffix = ".gguf" if config.output.format == "gguf" else ""
    for label, plan in plans.items():
        saving = _saving(config, job.folder / FOLDER / f"{label}{suffix}")
        measured = {"dense": _of(rows, "dense"), label: _of(rows, label)}
        files: list[Path] = []

        make = partial(_save, job, saving, plan, measured, files)
        flat = results_rows([row for row in rows if row.label in measured])
        output = config.output.model_dump(exclude={"dir", "plots"})
        job.stage(f"checkpoint {label}", [job.model_hash, job.pruned_key, label, output, flat], files, make)


def _save(job: Job, saving: Saving, plan: Pruned, measured: Mapping[str, list[EvalResult]], files: list[Path]) -> None:
    """Load, prune and save one model, and add what was written to ``files``."""
    source = model_source(job.config)
    placed = source.device_map is not None or source.stream is not None
    by_blocks = placed and saving.can_leave(job.loaded.model, plan)
    loaded = (
        job.loaded
        if by_blocks
        else load_model(source if source.device_map is not None else replace(source, device="cpu"))
    )
    saving.check_plan(loaded, plan_of(plan), job.reporter)
    unfinished = saving.out.with_name(f"{saving.out.name}.part")
    saving = replace(saving, by_blocks=by_blocks, unfinished=unfinished, model_hash=job.model_hash)
    saving.prune_and_save(loaded, plan, {label: found for label, found in measured.items() if found}, job.reporter)
    files += sorted(p for p in saving.out.rglob("*") if p.is_file()) if saving.out.is_dir() else [saving.out]


def _saving(config: RunConfig, out: Path) -> Saving:
    asked = config.output
    return Saving(out, asked.format, asked.pad_to_widest, asked.max_shard_size, overwrite=True)


def _of(rows: Sequence[EvalRow], label: str) -> list[EvalResult]:
    return [one for row in rows if row.label == label for one in row.results]
