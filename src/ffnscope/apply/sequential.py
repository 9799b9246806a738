"""Reconstruct a pruned model block by block, each on what the pruned blocks before it really put out.

The pruned stream runs through block after block with dense weights; the refitted down columns of a block then change
what it has put out, and that is what the next block is given. With a target other than "own", a stream of the dense
model runs beside it, and the columns also make up for a share of what the two streams have come to differ by. SparseGPT
(arXiv:2301.00774) recalibrates in the same order with the own target; here the unit is a whole FFN and the refit a
least squares of its kept columns that is pulled towards the old weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ffnscope.apply.block_files import BlockFiles
from ffnscope.apply.block_fit import Columns, SiteSums, fit_columns
from ffnscope.apply.mask import check_plan
from ffnscope.apply.reconstruction import Reconstruction, check_linear
from ffnscope.apply.streams import Streams, open_streams
from ffnscope.calibrate.collect import weights_hash
from ffnscope.calibrate.forward import memory_errors
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.offload import materialised
from ffnscope.ffn.projection import weights_of
from ffnscope.io import hash_json, plan_to_dict
from ffnscope.types import FFNSite, PruningPlan

OnBlock = Callable[[int, int], None]
TARGET = 0.35
HELD_OUT_EVERY = 8


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
            them. None = it starts again.
        model_hash: `weights_hash` of the model where it is known already; else a checkpoint takes the time to find it.
    """

    target: Literal["own", "dense"] | float = TARGET
    damping: float | None = None
    batch_size: int = 4
    checkpoint: Path | None = None
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
    the damping is chosen.

    Args:
        model: the dense model; bit-identical afterwards, also after an exception or Ctrl-C.
        windows: calibration text; at least 4 d_ff tokens, better 10 d_ff.
        plan: which channels stay. FFNs that keep all channels are fitted too: they can make up for others.
        options: target, damping, batches, checkpoint.
        on_block: called with (blocks done, blocks in all) after each block.

    Raises:
        UsageError: the plan is for another model, or there is no window.
        NotAvailableError: an FFN with a norm before its down projection, or that several layers share; or a model
            that is no chain of blocks (see `open_blocks`).
        NonFiniteError: activations overflowed; the FFN is named.
        DeviceError: out of memory.
        ArtifactError: a checkpoint is damaged or cannot be written.
    """
    options = options or SequentialOptions()
    check_plan(model, plan)
    check_linear(list(plan.kept))
    if len(windows) == 0 or not plan.kept:
        raise UsageError("a sequential reconstruction needs at least one window of text and one FFN in the plan.")
    files = BlockFiles(options.checkpoint, "" if options.checkpoint is None else _key(model, windows, plan, options))
    message = (
        f"out of memory in the sequential reconstruction ({options.batch_size} windows at a time). Lower batch_size."
    )
    with frozen(model), torch.no_grad(), memory_errors(message):
        streams = open_streams(model, list(plan.kept), *_batches(windows, options), options.mix)
        found: dict[FFNSite, Columns] = {}
        for block in range(streams.n_blocks):
            found |= _block(model, streams, plan, options, files, block)
            if on_block is not None:
                on_block(block + 1, streams.n_blocks)
    files.remove(range(streams.n_blocks))
    return _reconstruction(plan, found, windows, options, streams)


def _batches(windows: Windows, options: SequentialOptions) -> tuple[list[Windows], list[bool]]:
    """Batches of windows to fit, then of held-out ones; and which are held out."""
    held = torch.arange(len(windows)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    if options.damping is not None:
        held[:] = False
    fit = list(windows[~held].batches(options.batch_size))
    judge = list(windows[held].batches(options.batch_size))
    return fit + judge, [False] * len(fit) + [True] * len(judge)


def _block(
    model: nn.Module,
    streams: Streams,
    plan: PruningPlan,
    options: SequentialOptions,
    files: BlockFiles,
    block: int,
) -> dict[FFNSite, Columns]:
    """Find the columns of one block, or read them, and bring the streams behind it."""
    sites = streams.sites[block]
    known = files.read(block, sites) if sites else None
    sums = {site: SiteSums.empty() for site in sites}
    streams.enter(block, None if known is not None else sums)
    down: dict[FFNSite, Tensor] = {}
    with materialised(model, *sites):
        down = {site: weights_of(model, site).down for site in sites}
    found: dict[FFNSite, Columns] = known or {}
    if known is None and sites:
        for site in sites:
            try:
                found[site] = fit_columns(down[site], plan.kept[site], sums.pop(site), options.damping)
            except NonFiniteError as error:
                raise NonFiniteError(f"{site.name}: {error}") from error
        files.write(block, found)
    streams.leave(block, {site: (down[site], _whole(one, site)) for site, one in found.items()})
    return found


def _whole(columns: Columns, site: FFNSite) -> Tensor:
    """Columns of all channels [d_model, d_ff], zero for those that are removed."""
    whole = columns.down.new_zeros(site.d_model, site.d_ff)
    return whole.index_copy_(1, columns.kept.to(whole.device), columns.down)


def _reconstruction(
    plan: PruningPlan,
    found: Mapping[FFNSite, Columns],
    windows: Windows,
    options: SequentialOptions,
    streams: Streams,
) -> Reconstruction:
    _warn(found)
    kept = {site: found[site].kept for site in plan.kept}
    rows = {site.name: {"target": streams.targets[site], **found[site].facts} for site in plan.kept}
    facts: dict[str, Any] = {
        "method": "sequential",
        "target": options.mix,
        "text": windows.hash,
        "tokens": windows.n_tokens,
        "sites": rows,
    }
    down = {site: found[site].down.cpu() for site in plan.kept}
    return Reconstruction(replace(plan, kept=kept), down, {}, facts)


def _warn(found: Mapping[FFNSite, Columns]) -> None:
    few = [s for s, one in found.items() if 0 < one.facts["tokens"] < 4 * s.d_ff]
    none = [s for s, one in found.items() if not one.facts["tokens"]]
    if few:
        least = min(few, key=lambda s: found[s].facts["tokens"] / s.d_ff)
        warnings.warn(
            f"{len(few)} of {len(found)} FFNs were fitted on fewer tokens than 4 d_ff ({least.name}: "
            f"{found[least].facts['tokens']} tokens for {least.d_ff} channels), which fits noise. Use more text.",
            stacklevel=3,
        )
    if none:
        warnings.warn(
            f"{len(none)} of {len(found)} FFNs were reached by no token of the pruned model ({none[0].name}); they "
            "keep all their channels.",
            stacklevel=3,
        )


def _key(model: nn.Module, windows: Windows, plan: PruningPlan, options: SequentialOptions) -> str:
    config = repr(getattr(model, "config", type(model).__name__))
    return hash_json(
        {
            "model": [options.model_hash or weights_hash(model), config],
            "windows": windows.hash,
            "plan": plan_to_dict(plan),
            "options": {
                name: value for name, value in asdict(options).items() if name not in ("checkpoint", "model_hash")
            },
        }
    )
