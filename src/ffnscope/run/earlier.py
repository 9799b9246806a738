"""The record of an earlier result, from which another cut is made: of `ffnscope prune`, or of a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ffnscope.apply.record import SCORES, STATISTICS, PruningRecord, TextRecipe, has_record, read_record, with_h_outer
from ffnscope.errors import ArtifactError, UsageError
from ffnscope.io import read_scores
from ffnscope.run.choices import find_core
from ffnscope.run.folder import CONFIG
from ffnscope.run.load import load_config
from ffnscope.run.schema import RunConfig
from ffnscope.run.stages import HELD_OUT
from ffnscope.run.windows import calibration_source, text_source
from ffnscope.types import Budget


def find_record(folder: Path, metric: str | None = None) -> PruningRecord:
    """Read what `ffnscope prune` or `ffnscope run` has left in a folder; see `recut`.

    Args:
        folder: output of one of these commands.
        metric: chooses among the scores of a run; None where it has those of one metric that prunes.

    Raises:
        ArtifactError: the folder is none of them, or is not finished or damaged.
        UsageError: it holds no scores of this metric, or those of several and none is chosen.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ArtifactError(f"{folder} {what}; name the output of an earlier `ffnscope prune` or `ffnscope run`.")
    if has_record(folder) or not (folder / CONFIG).is_file():
        found = read_record(folder)
        if metric not in (None, found.scores.metric):
            raise UsageError(f"{folder} holds scores of {found.scores.metric}; {metric!r} is not among them.")
        return found
    return _of_run(folder, load_config(folder / CONFIG), metric)


def _of_run(folder: Path, config: RunConfig, metric: str | None) -> PruningRecord:
    scores, facts = read_scores(folder / SCORES)
    known = [name for name in config.pruning.algorithms if name in scores] if config.pruning.enabled else list(scores)
    if metric is None and len(known) != 1:
        raise UsageError(f"{folder} holds scores of {', '.join(known)}; choose one by --metric.")
    chosen = known[0] if metric is None else metric
    if chosen not in scores:
        raise UsageError(f"{folder} holds scores of {', '.join(scores)}; {chosen!r} is not among them.")
    asked, given = config.pruning, config.calibration
    protects = asked.enabled and config.supernode.enabled and config.supernode.protect_core
    protected = find_core(config, scores) if protects else None
    size: Any = {"n": config.num_samples, "length": config.max_length, "seed": config.seed}
    size |= {"mode": given.mode, "answers_only": given.answers_only}
    model = {"hash": facts["model"], "model_id": config.model.model_id, "dtype": config.model.dtype}
    return PruningRecord(
        str(folder),
        scores[chosen],
        asked.chosen(chosen),
        Budget(asked.ratios[0], asked.multiple_of, asked.min_width),
        {**model, "revision": config.model.revision},
        given.batch_size,
        TextRecipe(calibration_source(config), hash=facts["calibration"]["hash"], **size),
        _held_out(config),
        protected or {},
        with_h_outer(folder / STATISTICS),
        with_h_outer(folder / f"{HELD_OUT}.safetensors"),
    )


def _held_out(config: RunConfig) -> dict[str, Any]:
    """The first text that the run was measured on."""
    asked = config.evaluation
    size = {"n": asked.num_samples, "length": config.evaluation_max_length, "seed": config.experiment.seed}
    return {**size, "source": asdict(text_source(config.evaluation_text))} if asked.enabled else size
