"""Reconstruct a pruned model block by block, each on what the pruned blocks before it really put out.

The pruned stream runs through block after block with dense weights; the refitted down columns of a block then change
what it has put out, and that is what the next block is given. With a target other than "own", a stream of the dense
model runs beside it, and the columns also make up for a share of what the two streams have come to differ by. SparseGPT
(arXiv:2301.00774) recalibrates in the same order with the own target; here the unit is a whole FFN and the refit a
least squares of its kept columns that is pulled towards the old weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ffnscope.apply.block_distill import FFNDistiller, open_distiller
from ffnscope.apply.block_files import BlockFiles
from ffnscope.apply.block_fit import Columns, SiteSums, fit_columns
from ffnscope.apply.distill import Distillation
from ffnscope.apply.edits import Edit
from ffnscope.apply.few_tokens import few_tokens
from ffnscope.apply.held_out import HELD_OUT_EVERY, is_held_out
from ffnscope.apply.mask import check_plan
from ffnscope.apply.one_shot import TOKENS_PER_CHANNEL
from ffnscope.apply.reconstruction import Reconstruction, check_linear
from ffnscope.apply.rows import row_edits
from ffnscope.apply.streams import Streams, open_streams
from ffnscope.calibrate.collect import weights_hash
from ffnscope.calibrate.forward import memory_errors
from ffnscope.calibrate.states import HiddenStates
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.offload import materialised
from ffnscope.ffn.projection import down_bias, weights_of
from ffnscope.ffn.streamed import waiting_place
from ffnscope.io import hash_json, hash_tensors, plan_to_dict
from ffnscope.types import FFNSite, FFNWeights, PruningPlan

OnBlock = Callable[[int, int], None]
TARGET = 0.35
UNSEEN = ("checkpoint", "keep_checkpoint", "model_hash")  # options that do not change the columns
TRAINED = "_trained"  # key in what is told of an FFN within a call
OUT_OF_MEMORY = "out of memory in the sequential reconstruction ({} windows at a time). Lower batch_size."


@dataclass(frozen=True, slots=True)
class SequentialOptions:
    """How a sequential reconstruction runs.

    Attributes:
        target: what the kept columns are fitted to. "own" (0): what the dense FFN puts out on the pruned model's
            tokens; "dense" (1): what makes the block put out what it does in the dense model; or a mix of both.
        damping: see `refit_down`; None chooses it per FFN on every 8th window, which the columns that are compared
            have not seen. With less than 8 windows it is 1e-2 then.
        batch_size: windows per forward; changes speed and memory, not results beyond rounding.
        checkpoint: folder for the columns of finished blocks; an interrupted call with the same arguments goes on after
            them. They are then not held in memory, but mapped from their files. None = it starts again.
        keep_checkpoint: leave these files for the caller to remove, who may still have to write what he is given.
        distillation: after its least squares, each FFN is trained towards the same target, on its inputs in the pruned
            stream: gate, up, down and biases of the kept channels (see `distill`). Its block runs once more. Where no
            epoch lowers the error on every 8th window, which are held out for that, the columns of the least squares
            stay. The facts say that the result is trained. None = nothing is trained.
        model_hash: `weights_hash` of the model where it is known already; else a checkpoint takes the time to find it.
    """

    target: Literal["own", "dense"] | float = TARGET
    damping: float | None = None
    batch_size: int = 4
    checkpoint: Path | None = None
    keep_checkpoint: bool = False
    distillation: Distillation | None = None
    model_hash: str | None = None

    def __post_init__(self) -> None:
        if self.target not in ("own", "dense") and not (isinstance(self.target, int | float) and 0 <= self.target <= 1):
            raise UsageError(f"target must be 'own', 'dense' or a share between 0 and 1; got {self.target!r}.")
        if self.damping is not None and not 0 < self.damping < float("inf"):
            raise UsageError(
                f"damping must be positive, a share of the mean power of the channels; got {self.damping}."
            )
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1; got {self.batch_size}.")

    @property
    def mix(self) -> float:
        """The target as a number: 0 = own, 1 = dense."""
        return float({"own": 0, "dense": 1}.get(str(self.target), self.target))


def reconstruct_sequential(
    model: nn.Module,
    windows: Windows,
    plan: PruningPlan,
    *,
    options: SequentialOptions | None = None,
    on_block: OnBlock | None = None,
    error_weights: Mapping[FFNSite, Tensor] | None = None,
) -> Reconstruction:
    """Fit the kept down columns of a plan block by block, on the hidden states of the pruned model.

    With W the dense columns, h the channels on the pruned stream and a the target, the columns of an FFN minimise the
    ridge problem of `refit_down` for t = W h + a (O_dense - O_own): O are the outputs of the block in the dense model
    and of the dense block in the pruned model. Where the block does not add the FFN's output as it is (a norm behind
    it), the outputs of the FFN stand for those of the block; of several FFNs that it adds, the first takes the
    difference of the block. Experts are fitted to their own outputs, on the tokens that the router of the pruned model
    gives them; one without tokens keeps all its channels, in the plan of the result too.

    Every block runs once over the windows for each stream, so the cost is that of two forwards (one with the own
    target) and the least squares. Blocks with experts, with norms behind their FFN, or with more than 1 GiB of channel
    activations run a third time, with the new columns.

    Memory beside the model: hidden states of all windows, n_tokens * d_model once per stream in the model's dtype; the
    activations of one block (at most 1 GiB); per FFN of a block d_ff^2 + d_model * d_ff numbers of 8 bytes, twice where
    the damping is chosen. A distillation keeps inputs and targets of one block, each n_tokens * d_model in the model's
    dtype, instead of activations, and six times the weights of one pruned FFN in float32.

    Args:
        model: the dense model; bit-identical afterwards, also after an exception or Ctrl-C.
        windows: calibration text; at least 4 d_ff tokens, better 10 d_ff.
        plan: which channels stay. FFNs that keep all channels are fitted too: they can make up for others.
        options: target, damping, batches, checkpoint.
        on_block: called with (blocks done, blocks in all) after each block; with a distillation also after each epoch,
            which counts like a block.
        error_weights: see `distill`; FFNs that are absent have equal weights.

    Raises:
        UsageError: the plan is for another model, there is no window, or none to hold out for a distillation.
        NotAvailableError: an FFN with a norm before its down projection, that several layers share, or that cannot be
            distilled (see `check_distillable`); or a model that is no chain of blocks (see `open_blocks`).
        NonFiniteError: activations overflowed; the FFN is named.
        DeviceError: out of memory.
        ArtifactError: a checkpoint is damaged or cannot be written.

    Warns:
        UserWarning: FFNs with fewer than 4 tokens per channel, before the work; afterwards, experts that the router
            gave fewer than that, or none.
    """
    found: dict[FFNSite, Columns] = {}
    facts = fit_blocks(model, windows, plan, options, take=found.update, on_block=on_block, error_weights=error_weights)
    return reconstruction_of(plan, found, facts)


def fit_blocks(
    model: nn.Module,
    windows: Windows,
    plan: PruningPlan,
    options: SequentialOptions | None = None,
    *,
    take: Callable[[dict[FFNSite, Columns]], None],
    on_block: OnBlock | None = None,
    error_weights: Mapping[FFNSite, Tensor] | None = None,
) -> dict[str, Any]:
    """`reconstruct_sequential`, which gives away what it finds, block by block, and keeps none; return its facts.

    ``take`` is called within ``no_grad``, the model being frozen and as it was.
    """
    options = options or SequentialOptions()
    check_plan(model, plan)
    check_linear(list(plan.kept))
    if len(windows) == 0 or not plan.kept:
        raise UsageError("a sequential reconstruction needs at least one window of text and one FFN in the plan.")
    few = few_tokens(model, list(plan.kept), windows.n_tokens)
    if few is not None:
        warnings.warn(f"{few}.", stacklevel=3)
    key = "" if options.checkpoint is None else _key(model, windows, plan, options, error_weights or {})
    files = BlockFiles(options.checkpoint, key)
    limited = memory_errors(OUT_OF_MEMORY.format(options.batch_size))
    with frozen(model), torch.no_grad(), limited, HiddenStates(*waiting_place(model)) as states:
        split = _batches(windows, options)
        distiller = open_distiller(model, list(plan.kept), windows, options.distillation, error_weights)
        keeps = distiller is not None
        streams = open_streams(model, list(plan.kept), *split, options.mix, keeps_inputs=keeps, states=states)
        work = _Work(streams, plan, options, files, windows.n_tokens, distiller)
        told = _all_blocks(work, on_block, take)
    if not options.keep_checkpoint:
        files.remove()
    _warn(told)
    return _facts(told, windows, options)


def _all_blocks(
    work: _Work, on_block: OnBlock | None, take: Callable[[dict[FFNSite, Columns]], None]
) -> dict[FFNSite, Mapping[str, Any]]:
    """Hand on the columns of one block after the other; return what is told of each FFN."""
    distillation = work.options.distillation
    steps = _Steps(on_block, work.streams.n_blocks, 0 if distillation is None else distillation.epochs)
    told: dict[FFNSite, Mapping[str, Any]] = {}
    for block in range(work.streams.n_blocks):
        found = _block(work, block, steps)
        for site, one in found.items():
            trained = {TRAINED: True} if one.rows is not None else {}
            told[site] = {"target": work.streams.targets[site], **one.facts, **trained}
        take(found)
        steps.end(block)
    return told


@dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """Counts finished blocks, and the epochs in them, for a callback."""

    call: OnBlock | None
    n_blocks: int
    epochs: int

    def end(self, block: int) -> None:
        self._tell((block + 1) * (1 + self.epochs))

    def epoch(self, block: int, place: int, sites: int, done: int, total: int) -> None:
        """``done`` of ``total`` epochs of the ``place``-th of some ``sites`` in a block."""
        self._tell(block * (1 + self.epochs) + (place * total + done) // sites)

    def _tell(self, done: int) -> None:
        if self.call is not None:
            self.call(done, self.n_blocks * (1 + self.epochs))


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """What the blocks have in common."""

    streams: Streams
    plan: PruningPlan
    options: SequentialOptions
    files: BlockFiles
    n_tokens: int
    distiller: FFNDistiller | None


def _batches(windows: Windows, options: SequentialOptions) -> tuple[list[Windows], list[bool]]:
    """Batches of windows to fit, then of held-out ones; and which are held out."""
    held = is_held_out(windows)
    if options.damping is not None and options.distillation is None:
        held[:] = False
    if options.distillation is not None and not bool(held.any()):
        raise UsageError(
            f"a distillation holds out every {HELD_OUT_EVERY}th window to choose the epoch; got {len(windows)} "
            f"windows. Give at least {HELD_OUT_EVERY}."
        )
    fit = list(windows[~held].batches(options.batch_size))
    judge = list(windows[held].batches(options.batch_size))
    return fit + judge, [False] * len(fit) + [True] * len(judge)


def _block(work: _Work, block: int, steps: _Steps) -> dict[FFNSite, Columns]:
    """Find the columns of one block, or read them, and bring the streams behind it."""
    streams, model = work.streams, work.streams.model
    sites = streams.sites[block]
    known = work.files.read(block, sites) if sites else None
    kept_tokens = None if work.distiller is None else work.n_tokens
    sums = {site: SiteSums.empty(kept_tokens) for site in sites}
    streams.enter(block, None if known is not None else sums)
    dense: dict[FFNSite, FFNWeights] = {}
    with materialised(model, *sites):
        dense = {site: weights_of(model, site) for site in sites}
    found: dict[FFNSite, Columns] = known or {}
    if known is None and sites:
        for place, site in enumerate(sites):
            report = partial(steps.epoch, block, place, len(sites))
            try:
                found[site] = _fitted(work, site, dense[site], sums.pop(site), report)
            except NonFiniteError as error:
                raise NonFiniteError(f"{site.name}: {error}") from error
        found = work.files.write(block, found)
    edits = [edit for site, one in found.items() for edit in _edits(model, site, one)]
    streams.leave(block, {site: (dense[site].down, _whole(one, site)) for site, one in found.items()}, edits)
    return found


def _fitted(work: _Work, site: FFNSite, dense: FFNWeights, sums: SiteSums, on_epoch: OnBlock) -> Columns:
    """The columns of one FFN, and what else was trained; ``sums`` is used up."""
    tokens = sums.tokens
    found = fit_columns(dense.down, work.plan.kept[site], sums, work.options.damping)
    del sums  # as large as the weights, and not needed to train
    if work.distiller is None or tokens is None:
        return found
    return work.distiller.improved(site, dense, found, tokens, on_epoch)


def _edits(model: nn.Module, site: FFNSite, columns: Columns) -> Iterator[Edit]:
    """What was changed beside the columns."""
    if columns.rows is not None:
        yield from row_edits(model, site, columns.kept, columns.rows)
    bias = None if columns.bias is None else down_bias(model, site)
    if bias is not None:
        yield Edit(bias, columns.bias, adds=True)


def _whole(columns: Columns, site: FFNSite) -> Tensor:
    """Columns of all channels [d_model, d_ff], zero for those that are removed."""
    whole = columns.down.new_zeros(site.d_model, site.d_ff)
    return whole.index_copy_(1, columns.kept.to(whole.device), columns.down)


def reconstruction_of(plan: PruningPlan, found: Mapping[FFNSite, Columns], facts: Mapping[str, Any]) -> Reconstruction:
    """A reconstruction from what was found for some of the sites of a plan, or all; tensors move to the CPU."""
    down = {site: found[site].down.cpu() for site in plan.kept if site in found}
    bias = {site: one.bias.cpu() for site, one in found.items() if one.bias is not None}
    rows = {site: one.rows.to_cpu() for site, one in found.items() if one.rows is not None}
    kept = {site: found[site].kept if site in found else index for site, index in plan.kept.items()}
    return Reconstruction(replace(plan, kept=kept), down, bias, facts, rows)


def _facts(told: Mapping[FFNSite, Mapping[str, Any]], windows: Windows, options: SequentialOptions) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "method": "sequential",
        "target": options.mix,
        "text": windows.hash,
        "tokens": windows.n_tokens,
        "sites": {site.name: {k: v for k, v in one.items() if k != TRAINED} for site, one in told.items()},
    }
    if options.distillation is not None:
        facts["distillation"] = asdict(options.distillation)
        facts["trained"] = any(TRAINED in one for one in told.values())
    return facts


def _warn(told: Mapping[FFNSite, Mapping[str, Any]]) -> None:
    experts = {s: one for s, one in told.items() if s.expert is not None}
    few = [s for s, one in experts.items() if 0 < one["tokens"] < TOKENS_PER_CHANNEL * s.d_ff]
    none = [s for s, one in told.items() if not one["tokens"]]
    if few:
        least = min(few, key=lambda s: told[s]["tokens"] / s.d_ff)
        warnings.warn(
            f"{len(few)} of {len(experts)} experts were fitted on fewer tokens than {TOKENS_PER_CHANNEL} d_ff "
            f"({least.name}: its router gave it {told[least]['tokens']} tokens for {least.d_ff} channels), which fits "
            "noise. Use more text.",
            stacklevel=4,
        )
    if none:
        warnings.warn(
            f"{len(none)} of {len(told)} FFNs were reached by no token of the pruned model ({none[0].name}); they "
            "keep all their channels.",
            stacklevel=4,
        )


def _key(
    model: nn.Module,
    windows: Windows,
    plan: PruningPlan,
    options: SequentialOptions,
    error_weights: Mapping[FFNSite, Tensor],
) -> str:
    config = repr(getattr(model, "config", type(model).__name__))
    return hash_json(
        {
            "model": [options.model_hash or weights_hash(model), config],
            "windows": windows.hash,
            "plan": plan_to_dict(plan),
            "options": {name: value for name, value in asdict(options).items() if name not in UNSEEN},
            "error_weights": hash_tensors((site.name, value) for site, value in error_weights.items()),
        }
    )
