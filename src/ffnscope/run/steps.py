"""Steps that a run and the single commands have in common, told to a reporter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ffnscope.analyze.memory import CalibrationBytes
from ffnscope.apply.block_files import BlockFiles
from ffnscope.apply.few_tokens import FEW, few_tokens
from ffnscope.apply.ffn_tokens import token_bytes
from ffnscope.apply.method import Method
from ffnscope.apply.pruned import Pruned
from ffnscope.apply.reconstruction import Reconstruction, read_reconstruction, write_reconstruction
from ffnscope.apply.sequential import SequentialOptions
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import ArtifactError
from ffnscope.evaluate.compare import EvalRow, compare_plans
from ffnscope.evaluate.tasks import TaskOptions, TaskSet, load_tasks
from ffnscope.io import read_stats, read_tensors
from ffnscope.run.progress import Reporter
from ffnscope.saving import writing
from ffnscope.types import FFNSite, PruningPlan

ANNOUNCED_BYTES = 2**28


def announce(reporter: Reporter, found: CalibrationBytes) -> None:
    """Say how much a calibration takes, before one that takes much: with second moments, or of large batches."""
    if found.memory > ANNOUNCED_BYTES:
        reporter.say(found.told)


def tell_few_tokens(
    reporter: Reporter, model: nn.Module, method: Method, sites: Sequence[FFNSite], windows: Windows
) -> None:
    """Say before any work that a text is too short for a least squares."""
    few = few_tokens(model, sites, windows.n_tokens) if method.refits else None
    if few is not None:
        reporter.say(f"warning: {few}")


def announce_training(
    reporter: Reporter, model: nn.Module, method: Method, plan: PruningPlan, windows: Windows
) -> None:
    """Say before a distillation that weights are trained, on what, and what that keeps in memory."""
    if method.distill is None:
        return
    kept = token_bytes(model, list(plan.kept), windows.n_tokens)
    reporter.say(
        f"distill: gate, up and down of every FFN are trained for up to {method.distill} epochs on "
        f"{windows.n_tokens:,} tokens, without labels; inputs and targets of one FFN take {kept / 2**20:,.0f} MiB"
    )


def compare_with_dense(
    reporter: Reporter,
    model: nn.Module,
    plans: Mapping[str, Pruned],
    windows: Windows,
    batch_size: int,
    state: Path | None = None,
) -> list[EvalRow]:
    """Evaluate the dense model and every plan, with progress in tokens; see `compare_plans`."""
    per_batch = batch_size * windows.length * (1 + len(plans))
    with reporter.task(f"evaluate on {windows.source.split(':')[0]}", "tokens") as update:
        return compare_plans(
            model,
            plans,
            windows,
            batch_size=batch_size,
            state=state,
            on_batch=lambda done, total: update(done * per_batch, total * per_batch),
        )


def open_tasks(options: TaskOptions | None, reporter: Reporter) -> TaskSet | None:
    """Load the downstream tasks, if there are any, so that one that is missing shows at once; see `load_tasks`."""
    if options is None:
        return None
    with reporter.task("load tasks", "tasks"):
        return load_tasks(options)


def keep_reconstruction(
    reporter: Reporter,
    name: str,
    path: Path,
    options: SequentialOptions,
    make: Callable[..., Pruned],
    unit: str = "blocks",
) -> Reconstruction:
    """Reconstruct and write it to ``path``, with progress; an interrupted one goes on after its last block.

    Args:
        reporter: told what is done.
        name: of the step.
        path: file of the reconstruction; replaced.
        options: with the folder of finished blocks, those of which that are damaged are deleted.
        make: `reconstruct_plan` but for ``options`` and ``on_block``.
        unit: what ``on_block`` counts.
    """
    for block in options.checkpoint.glob("*.safetensors") if options.checkpoint else ():
        discard_damaged(reporter, block, read_tensors)
    with reporter.task(name, unit) as update, warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{FEW}")  # told before anything was begun
        made = make(options=replace(options, keep_checkpoint=True), on_block=update)
    assert isinstance(made, Reconstruction), "checked by the caller"
    write_reconstruction(path, made, overwrite=True)
    BlockFiles(options.checkpoint).remove()
    return read_reconstruction(path)  # mapped from the file, where ``made`` may be in memory


def discard_damaged(reporter: Reporter, path: Path, read: Callable[[Path], Any] | None = None) -> None:
    """Delete the state of an unfinished stage that cannot be read, and say so, so that the stage starts anew.

    ``read`` raises for a damaged file; by default it expects the sums of an unfinished pass.
    """
    if not path.exists():
        return
    try:
        (read or _read_sums)(path)
    except (ArtifactError, ArithmeticError, ValueError) as error:
        reporter.say(f"{error} It is deleted, and this stage starts anew.")
        with writing(path):
            path.unlink()


def _read_sums(path: Path) -> None:
    _, facts = read_stats(path)
    if not (isinstance(facts.get("key"), str) and isinstance(facts.get("next_step"), int)):
        raise ArtifactError(f"{path} does not say how far its pass had come.")
