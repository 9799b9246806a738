"""Prune a model into a new checkpoint block by block, without changing it: for models that do not fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ffnscope.apply.block_files import BlockFiles
from ffnscope.apply.block_fit import Columns
from ffnscope.apply.block_writer import BlockWriter
from ffnscope.apply.card import loading_code, model_card
from ffnscope.apply.export import SHARD, add_modeling, check_prunable, complete_checkpoint, write_card
from ffnscope.apply.folder import refuse_existing, replacing_folder
from ffnscope.apply.new_bias import without_bias
from ffnscope.apply.padding import zeroed_among
from ffnscope.apply.pruned import Pruned, plan_of
from ffnscope.apply.reconstruction import Reconstruction, check_linear, part_of
from ffnscope.apply.sequential import SequentialOptions, fit_blocks, reconstruction_of
from ffnscope.apply.written_blocks import WrittenBlocks, remove_written
from ffnscope.calibrate.blocks import list_of_blocks
from ffnscope.calibrate.collect import weights_hash
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NotAvailableError
from ffnscope.ffn.load import quiet_transformers
from ffnscope.io import hash_json, plan_to_dict
from ffnscope.types import EvalResult, FFNSite, PruningPlan


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a checkpoint is written, and how.

    Attributes:
        path: folder; written under a temporary name and renamed.
        max_shard_size: a block larger than this takes several files.
        pad_to_widest: see `prune_`.
        overwrite: replace what is there.
        checkpoint: folder for finished blocks; an interrupted call with the same arguments goes on after the last
            intact one. On the disk of ``path`` it takes no further space. None = it starts again.
        model_hash: `weights_hash` of the model where it is known already; else a checkpoint takes the time to find it.
    """

    path: Path
    max_shard_size: str = SHARD
    pad_to_widest: bool = False
    overwrite: bool = False
    checkpoint: Path | None = None
    model_hash: str | None = None


def write_pruned(
    model: nn.Module,
    tokenizer: Any,
    output: Destination,
    pruned: Pruned,
    results: Mapping[str, Sequence[EvalResult]] | None = None,
) -> tuple[int, int]:
    """Write the checkpoint that `prune_` (or `reconstruct_`) and `save_model` would, but leave the model as it was.

    The blocks are read, cut and written one after the other, a file each, so neither the dense nor the pruned model is
    ever in memory as a whole. Plain `transformers` loads the result under the same conditions.

    Args:
        model: the dense model, offloaded or not.
        tokenizer: saved too; may be None.
        output: where.
        pruned: a plan or a reconstruction.
        results: label ("dense", "pruned") -> measurements, told in the card.

    Returns:
        Parameters that were written, and channels that the plan removes but that are in the files as zeros.

    Raises:
        ArtifactError: the path exists and may not be replaced, or it cannot be written.
        NotAvailableError: FFNs outside one list of blocks, or a bias where the model has none.
        UsageError, ModelError, NonFiniteError, LayoutError: see `prune_` and `save_model`.
    """
    plan = plan_of(pruned)
    if isinstance(pruned, Reconstruction):
        check_linear(pruned.sites)
        _check_bias(model, pruned)
    told = pruned.told_plan if isinstance(pruned, Reconstruction) else plan
    with _writing(model, output, plan) as (writer, folder):
        for path, sites in _blocks(model, list(plan.kept)):
            writer.write(path, _part(pruned, sites))
        written = _finish(writer, folder, tokenizer, told, output, results or {})
    _clean(output)
    return written


def reconstruct_to(
    model: nn.Module,
    tokenizer: Any,
    output: Destination,
    windows: Windows,
    plan: PruningPlan,
    options: SequentialOptions | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> PruningPlan:
    """Reconstruct a plan block by block, and write each block as soon as its columns are found.

    The result is that of `reconstruct_sequential`, `reconstruct_` and `save_model`, but new columns exist for one block
    at a time. Weights outside the blocks are written last. A checkpoint of ``output`` holds the columns of finished
    blocks too, unless ``options`` name another folder for them; those that go on run through all blocks once more.

    Args:
        model: the dense model, offloaded or not; left as it was.
        tokenizer: saved too; may be None.
        output: where.
        windows: calibration text.
        plan: which channels stay.
        options: see `reconstruct_sequential`.
        on_block: called with (blocks done, blocks in all).

    Returns:
        The plan with the facts of the reconstruction in its provenance, as it is saved.

    Raises:
        ArtifactError: the path exists and may not be replaced, or it cannot be written.
        UsageError, NotAvailableError, NonFiniteError, DeviceError: see `reconstruct_sequential` and `write_pruned`.
    """
    check_linear(list(plan.kept))
    kept = dict(plan.kept)
    options = _kept_columns(options or SequentialOptions(), output)
    with _writing(model, output, plan) as (writer, folder):
        blocks = iter(_blocks(model, list(plan.kept)))

        def take(found: dict[FFNSite, Columns]) -> None:
            path, sites = next(blocks)
            kept.update({site: one.kept for site, one in found.items()})
            part = replace(plan, kept={site: plan.kept[site] for site in sites}, protected={}, provenance={})
            writer.write(path, reconstruction_of(part, found, {}))

        facts = fit_blocks(model, windows, plan, options, take=take, on_block=on_block)
        for path, _ in blocks:  # behind the last one with an FFN
            writer.write(path, replace(plan, kept={}, protected={}, provenance={}))
        told = replace(plan, kept=kept, provenance={**plan.provenance, "reconstruction": facts})
        _finish(writer, folder, tokenizer, told, output, {})
    BlockFiles(options.checkpoint).remove()
    _clean(output)
    return told


@contextlib.contextmanager
def _writing(model: nn.Module, output: Destination, plan: PruningPlan) -> Generator[tuple[BlockWriter, Path]]:
    refuse_existing(output.path, output.overwrite)
    check_prunable(model, plan)
    size, pad = output.max_shard_size, output.pad_to_widest
    written = None if output.checkpoint is None else WrittenBlocks(output.checkpoint, _key(model, output, plan))
    with replacing_folder(output.path, output.overwrite) as folder, quiet_transformers():
        writer = BlockWriter(model, folder, plan, max_shard_size=size, pad_to_widest=pad, written=written)
        yield writer, folder


def _key(model: nn.Module, output: Destination, plan: PruningPlan) -> str:
    """Hash of what all blocks of a checkpoint depend on."""
    config = repr(getattr(model, "config", type(model).__name__))
    cut = plan_to_dict(replace(plan, protected={}, provenance={}))
    known = output.model_hash or weights_hash(model)
    return hash_json([known, config, cut, output.max_shard_size, output.pad_to_widest])


def _kept_columns(options: SequentialOptions, output: Destination) -> SequentialOptions:
    folder = options.checkpoint or (None if output.checkpoint is None else output.checkpoint / "columns")
    known = options.model_hash or output.model_hash
    return replace(options, checkpoint=folder, keep_checkpoint=True, model_hash=known)


def _clean(output: Destination) -> None:
    if output.checkpoint is not None:
        remove_written(output.checkpoint)


def _finish(
    writer: BlockWriter,
    folder: Path,
    tokenizer: Any,
    plan: PruningPlan,
    output: Destination,
    results: Mapping[str, Sequence[EvalResult]],
) -> tuple[int, int]:
    changes = writer.finish()
    complete_checkpoint(folder, tokenizer, plan)
    zeroed = zeroed_among(writer.found_widths, plan)
    if changes:
        add_modeling(folder, writer.skeleton, changes, writer.found_widths)
    loading = loading_code(output.path.name, remote=bool(changes))
    write_card(folder, model_card(writer.skeleton, output.path.name, loading, plan, results, zeroed))
    return writer.n_parameters, zeroed


def _blocks(model: nn.Module, sites: Sequence[FFNSite]) -> list[tuple[str, list[FFNSite]]]:
    """Path of each block, with the sites in it."""
    names, _ = list_of_blocks(model, sites)
    return [(name, [s for s in sites if f"{s.path}.".startswith(f"{name}.")]) for name in names]


def _part(pruned: Pruned, sites: Sequence[FFNSite]) -> Pruned:
    if isinstance(pruned, Reconstruction):
        return part_of(pruned, sites)
    return replace(pruned, kept={site: pruned.kept[site] for site in sites}, protected={}, provenance={})


def _check_bias(model: nn.Module, pruned: Reconstruction) -> None:
    new = without_bias(model, list(pruned.bias))
    if new:
        raise NotAvailableError(
            f"{new[0].name} has no bias, and a checkpoint that is written block by block cannot be given one. "
            "Reconstruct by least squares (sequential or one_shot), or use reconstruct_ and save_model."
        )
