"""Hidden states of the pruned and of the dense model, carried from block to block side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ffnscope.apply.block_fit import SiteSums
from ffnscope.apply.block_output import output_gains
from ffnscope.apply.columns import columns_replaced
from ffnscope.apply.edits import Edit, applied
from ffnscope.calibrate.blocks import Blocks, trace_blocks
from ffnscope.calibrate.rows import TokenRows
from ffnscope.calibrate.states import HiddenStates
from ffnscope.calibrate.taps import SignalTap, channel_taps
from ffnscope.calibrate.windows import Windows
from ffnscope.types import FFNSite

HELD_BYTES = 2**30
"""Channel activations of one block that may be kept to spare running it once more."""

HELD_ELSEWHERE = 2**27
"""The same where hidden states do not wait on the device that computes, since there is little room on it."""

Target = Literal["block", "ffn", "own"]
"""What a dense target compares: outputs of the block, of the FFN, or nothing (experts)."""


@dataclass(slots=True, eq=False)
class _Run:
    """One block on one batch: its output, and channels h, input x and output y of FFNs in it."""

    rows: TokenRows
    output: Tensor
    h: dict[FFNSite, Tensor]
    x: dict[FFNSite, Tensor]
    y: dict[FFNSite, Tensor]


@dataclass(slots=True, eq=False)
class Streams:
    """Hidden states before the next block, one tensor [b, T, d_model] per batch and stream.

    Attributes:
        model: the dense model, `frozen`.
        blocks: its blocks, with the text.
        held_out: per batch, whether its tokens are summed apart.
        sites: FFNs to reconstruct in each block, to the last block that has one.
        gains: FFNs whose output is added to that of the block, times a number (`output_gains`).
        targets: what is compared for each FFN.
        mix: share of the difference of the streams that is made up for.
        keeps_inputs: whether sums are given the inputs of FFNs too, since more than columns will be changed; every
            block with an FFN then runs again with what was changed.
        own: hidden states of the pruned model.
        own_place: makes an empty sequence for hidden states, where they wait.
        held_bytes: channel activations of one block that may be kept to spare running it once more.
        dense: those of the dense model; None as long as they are the same, and where ``mix`` is 0.
    """

    model: nn.Module
    blocks: Blocks
    held_out: Sequence[bool]
    sites: list[list[FFNSite]]
    gains: Mapping[FFNSite, float]
    targets: Mapping[FFNSite, Target]
    mix: float
    keeps_inputs: bool
    own: MutableSequence[Tensor]
    own_place: Callable[[], MutableSequence[Tensor]]
    held_bytes: int
    dense: MutableSequence[Tensor] | None = None
    _held: list[dict[FFNSite, Tensor]] = field(default_factory=list[dict[FFNSite, Tensor]])

    @property
    def n_blocks(self) -> int:
        """Blocks to the last one with an FFN to reconstruct."""
        return len(self.sites)

    def enter(self, block: int, sums: Mapping[FFNSite, SiteSums] | None) -> None:
        """Run a block with dense weights over all batches and add to the sums of its FFNs, if there are any to be made.

        Afterwards `dense` is behind the block. `own` is too where the block adds its FFNs' outputs as they are.
        """
        sites = self.sites[block]
        additive = self._is_additive(block)
        split = self.mix > 0 and self.dense is None and bool(sites)  # from here on the streams differ
        apart = self.own_place()
        self._held = []
        with self.blocks.held(block):
            self._enter(block, sums, apart, additive=additive, split=split)
        if split:
            self.dense = apart

    def _enter(
        self,
        block: int,
        sums: Mapping[FFNSite, SiteSums] | None,
        apart: MutableSequence[Tensor],
        *,
        additive: bool,
        split: bool,
    ) -> None:
        sites = self.sites[block]
        for batch in range(len(self.own)):
            dense = None if self.dense is None else self._run(block, batch, self.dense[batch], tapped=False)
            if sums is not None or additive or split:
                own = self._run(block, batch, self.own[batch], tapped=bool(sites))
                self._add(sites, batch, own, dense, sums)
                if split:
                    apart.append(own.output)
                if additive:
                    self.own[batch] = own.output
                    self._held.append(own.h)
            if self.dense is not None and dense is not None:
                self.dense[batch] = dense.output

    def leave(self, block: int, columns: Mapping[FFNSite, tuple[Tensor, Tensor]], edits: Sequence[Edit] = ()) -> None:
        """Bring `own` behind the block, with its down columns changed: site -> old and new ones, [d_model, d_ff].

        ``edits`` are further changes, where inputs are kept.
        """
        if block == self.n_blocks - 1 or (not columns and self._is_additive(block)):
            self._held = []
            return
        if not self._is_additive(block):
            new_columns = {site: new for site, (_, new) in columns.items()}
            changed = columns_replaced(self.model, new_columns), applied(self.model, edits)
            with changed[0], changed[1], self.blocks.held(block):
                for batch in range(len(self.own)):
                    self.own[batch] = self.blocks.run(block, batch, self.own[batch])
            return
        change = {s: self.gains[s] * (_wide(new).to(old.device) - _wide(old)) for s, (old, new) in columns.items()}
        for batch, held in enumerate(self._held):
            stream = _wide(self.own[batch])
            for site, h in held.items():
                stream = stream + (_wide(h) @ change[site].T).view(stream.shape).to(stream.device)
            self.own[batch] = stream.to(self.own[batch].dtype)
        self._held = []

    def _is_additive(self, block: int) -> bool:
        """Whether new columns change a block's output by what can be added to it, from activations that can be kept."""
        sites = self.sites[block]
        if sites and self.keeps_inputs:
            return False
        numbers = sum(batch.input_ids.numel() for batch in self.blocks.batches) * sum(s.d_ff for s in sites)
        size = numbers * self.blocks.sample[0].itemsize
        return all(s in self.gains for s in sites) and size <= self.held_bytes

    def _run(self, block: int, batch: int, hidden: Tensor, *, tapped: bool) -> _Run:
        """Run a block, with h (and x) of its FFNs where ``tapped``, and with y of those whose outputs are compared."""
        compared = [s for s in self.sites[block] if self.targets[s] == "ffn"] if self.mix else []
        rows = TokenRows(self.blocks.batches[batch].valid)
        run = _Run(rows, hidden, {}, {}, {})

        def keep(site: FFNSite, name: str, value: Tensor) -> None:
            if name == "x":
                run.x[site] = value.clone()
            elif site in compared:
                run.y[site] = value.clone()  # some models add to it in place

        sites = self.sites[block] if tapped else compared
        names = (*("x",) * (tapped and self.keeps_inputs), *("y",) * bool(compared))
        tap = SignalTap(keep, names) if names else None
        with channel_taps(self.model, sites, run.h.__setitem__ if tapped else None, None, tap, rows.route):
            run.output = self.blocks.run(block, batch, hidden)
        return run

    def _add(
        self,
        sites: Sequence[FFNSite],
        batch: int,
        own: _Run,
        dense: _Run | None,
        sums: Mapping[FFNSite, SiteSums] | None,
    ) -> None:
        for site in sites if sums is not None else ():
            if site in own.h:  # else an expert without tokens
                assert sums is not None
                shift = None if dense is None else self._shift(site, own, dense)
                x = own.rows.take(site, own.x[site]) if self.keeps_inputs else None
                h = _wide(own.rows.take(site, own.h[site]))
                sums[site].add(h, shift, x, held_out=self.held_out[batch])

    def _shift(self, site: FFNSite, own: _Run, dense: _Run) -> Tensor | None:
        """What is wanted of an FFN beyond its own output, [n, d_model]."""
        target = self.targets[site]
        if target == "own":
            return None
        pair = (dense.output, own.output) if target == "block" else (dense.y[site], own.y[site])
        wanted, found = (_wide(own.rows.take(site, value)) for value in pair)
        share = self.mix / (self.gains[site] if target == "block" else 1.0)
        return ((wanted.to(found.device) - found) * share).to(own.h[site].device)


def open_streams(
    model: nn.Module,
    sites: Sequence[FFNSite],
    batches: Sequence[Windows],
    held_out: Sequence[bool],
    mix: float,
    *,
    keeps_inputs: bool = False,
    states: HiddenStates,
) -> Streams:
    """Open the streams of a `frozen` model before its first block; see `Streams`. Hidden states wait in ``states``.

    Raises:
        NotAvailableError: the model is no chain of blocks.
    """
    gains = output_gains(model, sites, batches[0])
    own = states.sequence()
    blocks = trace_blocks(model, sites, batches, own.append)
    here = blocks.sites_of(sites)
    last = max(block for block, found in enumerate(here) if found)
    targets: dict[FFNSite, Target] = {}
    for found in here:
        dense = [s for s in found if s.expert is None]
        first = next((s for s in dense if s in gains), None)
        targets |= {s: "own" if s.expert is not None else "block" if s == first else "ffn" for s in found}
    compares = any(target != "own" for target in targets.values())
    mix = mix if compares else 0.0
    held = HELD_BYTES if states.place == "device" else HELD_ELSEWHERE
    here = here[: last + 1]
    return Streams(model, blocks, held_out, here, gains, targets, mix, keeps_inputs, own, states.sequence, held)


def _wide(value: Tensor) -> Tensor:
    """The same in float32, or in float64 where it is that."""
    return value if value.dtype == torch.float64 else value.float()
