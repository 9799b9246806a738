"""The calibration pass block by block: every block is read once per direction, for the text of all steps.

Forward, the hidden states of all windows go through one block after the other; those of windows with gradients are
kept at every block. The head turns the last ones into gradients, slice by slice. Backward, each block is run again on
what it was given, and hands on the gradient of that: no graph spans more than one block of one batch. Where the pass
keeps files, each of these stages is saved at its end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.calibrate.blocks import Blocks, trace_blocks
from ffnscope.calibrate.forward import memory_errors
from ffnscope.calibrate.head import Head, open_head
from ffnscope.calibrate.head_pass import observe_head
from ffnscope.calibrate.observe import no_gradient, overflow
from ffnscope.calibrate.states import HiddenStates
from ffnscope.calibrate.steps import Step, begin_step
from ffnscope.calibrate.sweep_files import SweepFiles
from ffnscope.calibrate.taps import SignalTap, channel_taps
from ffnscope.errors import NotAvailableError
from ffnscope.ffn.streamed import waiting_place
from ffnscope.types import FFNSite

OnShare = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Stage:
    """A part of the pass behind which it can be interrupted.

    Attributes:
        name: in the names of files.
        n_runs: runs of a block on a batch.
        sites: what it observes.
        run: does it.
        before: the earlier stage that has observed these sites.
    """

    name: str
    n_runs: int
    sites: Sequence[FFNSite]
    run: Callable[[], None]
    before: str | None = None


def gradient_key(block: int, batch: int) -> tuple[int, int]:
    """Key among `HiddenStates` of the gradient of what a block is given."""
    return -1 - block, batch


def sweep(
    model: nn.Module,
    sites: Sequence[FFNSite],
    steps: Sequence[Step],
    accumulator: Accumulator,
    on_share: OnShare | None = None,
    kept: SweepFiles | None = None,
) -> None:
    """Do what running the steps one after the other does, up to rounding.

    The model must be `frozen`. Memory: the weights of one block, or of what stands behind the blocks; a batch within
    one block, with its graph where it runs backward; and where `ffnscope.ffn.streamed.waiting_place` says, the hidden
    states [n_tokens, d_model] of all steps once, of those that run backward once per block.

    Args:
        model: its weights may be offloaded.
        sites: what is observed.
        steps: batches, and what is observed of each.
        accumulator: takes what is observed.
        on_share: called with (runs of a block on a batch done, runs in all).
        kept: files that the pass goes on from, and in which each stage is saved: the accumulator must be new, or hold
            what is not from this pass. They are left when the pass has ended.

    Raises:
        ArtifactError: one of these files is damaged, or cannot be written.
        NotAvailableError: the model is no chain of blocks with a head that treats tokens one by one, or a statistic
            joins signals of two layers.
        NonFiniteError: an activation or gradient overflowed; the site is named.
        DeviceError: out of memory.
    """
    _check(accumulator)
    place, folder = waiting_place(model)
    message = "out of memory in the streamed pass. Lower calibration.batch_size, or let model.stream be cpu or disk."
    with memory_errors(message), HiddenStates(place, folder, kept) as states:
        ffns = [site for site in sites if site.role == "ffn"]
        done, sums, waiting = kept.resume() if kept else (0, [], [])
        devices: list[torch.device] = []

        def begin(hidden: torch.Tensor) -> None:
            if not done:
                states.put((0, len(devices)), hidden)
            devices.append(hidden.device)

        blocks = trace_blocks(model, ffns, [step.batch for step in steps], begin)
        accumulator.restore(sums)
        for key in waiting:
            states.take_over(key, devices[key[1]])
        _Sweep(blocks, sites, steps, accumulator, states, on_share).run(done, kept)


def _check(accumulator: Accumulator) -> None:
    found = next((s.name for s in (*accumulator.forward, *accumulator.backward) if s.reads_next), None)
    if found is not None:
        raise NotAvailableError(
            f"statistic {found!r} joins signals of two layers, which a streamed model does not hold at the same time. "
            "Leave out what needs it (cross_layer), or load the model without stream."
        )


class _Sweep:
    """One pass: blocks forward, head, blocks backward."""

    def __init__(
        self,
        blocks: Blocks,
        sites: Sequence[FFNSite],
        steps: Sequence[Step],
        accumulator: Accumulator,
        states: HiddenStates,
        on_share: OnShare | None,
    ):
        self.blocks, self.steps, self.accumulator, self.states = blocks, steps, accumulator, states
        self.here = blocks.sites_of(sites)
        inside = {site for found in self.here for site in found}
        self.behind = [site for site in sites if site not in inside]
        self.depth = len(blocks.names)
        self.backward = [i for i, step in enumerate(steps) if step.backward]
        starts = [b for b, found in enumerate(self.here) if any(s.role != "cut" for s in found)]
        self.first = starts[0]  # a graph begins at the first site, as it does in the whole model
        self.last = self.depth - 1 if self.behind else max(b for b, found in enumerate(self.here) if found)
        self.on_share = on_share
        forward = sum(self.depth if step.backward else self.last + 1 for step in steps)
        self.total = forward + len(self.backward) * (self.depth - self.first)
        self.done = 0

    def run(self, start: int, kept: SweepFiles | None) -> None:
        """Run the stages behind the first ``start``, which an earlier process has done."""
        stages = self._stages()
        self.done = sum(stage.n_runs for stage in stages[:start])
        for number, stage in enumerate(stages[start:], start + 1):
            stage.run()
            if kept is not None:
                sums = self.accumulator.sums.result(copy=False, sites=stage.sites)
                kept.end_stage(number, stage.name, sums.values(), self.states.keep(), stage.before)
        self._look(matrices=True)

    def _stages(self) -> list[_Stage]:
        stages: list[_Stage] = []
        for block, here in enumerate(self.here):
            batches = [i for i, step in enumerate(self.steps) if step.backward or block <= self.last]
            if batches:
                run = partial(self._forward, block, batches)
                stages.append(_Stage(f"forward_{block}", len(batches), here, run))
        if self.backward or self.behind:
            stages.append(_Stage("head", 0, self.behind, lambda: self._head(open_head(self.blocks))))
        for block in reversed(range(self.first, self.depth)) if self.backward else ():
            run = partial(self._backward, block)
            stages.append(_Stage(f"backward_{block}", len(self.backward), self.here[block], run, f"forward_{block}"))
        return stages

    def _forward(self, block: int, batches: Sequence[int]) -> None:
        with self.blocks.held(block), torch.no_grad():
            for i in batches:
                with self._observed(i, self.here[block], forward=self.steps[i].forward, backward=False):
                    output = self.blocks.run(block, i, self.states.get((block, i)))
                if not (self.steps[i].backward and block >= self.first):
                    self.states.drop((block, i))
                if block < self.last or self.steps[i].backward or self.behind:
                    self.states.put((block + 1, i), output)
                self._count()
        self._look("a channel activation")

    def _head(self, head: Head) -> None:
        with head.held():
            for i, step in enumerate(self.steps):
                if step.backward or self.behind:
                    hidden = self.states.pop((self.depth, i))
                    gradient = observe_head(head, self.behind, step, hidden, self.accumulator)
                    if gradient is not None:
                        self.states.put(gradient_key(self.depth, i), gradient)
        self._look()

    def _backward(self, block: int) -> None:
        with self.blocks.held(block), torch.inference_mode(False), torch.enable_grad():
            for i in self.backward:
                hidden = self.states.pop((block, i)).requires_grad_(block > self.first)
                gradient = self.states.pop(gradient_key(block + 1, i))
                with self._observed(i, self.here[block], forward=False, backward=True):
                    output = self.blocks.run(block, i, hidden)
                    if not output.requires_grad:
                        raise no_gradient(self.blocks.model)
                    torch.autograd.backward(output, gradient)
                del output
                if hidden.grad is not None:
                    self.states.put(gradient_key(block, i), hidden.grad)
                self._count()
        self._look()

    def _observed(
        self, batch: int, sites: Sequence[FFNSite], *, forward: bool, backward: bool
    ) -> contextlib.AbstractContextManager[None]:
        """Within the context, what these sites give in a run of their block is added to the sums."""
        if not sites or not (forward or backward):
            return contextlib.nullcontext()
        taken, step = self.accumulator, self.steps[batch]
        begin_step(taken, step, forward=forward, backward=backward)
        observe = taken.observe if taken.reads_activation else None
        gradient = taken.observe_gradient if backward else None
        tap = SignalTap(taken.observe_signal, taken.signals) if taken.signals else None
        return channel_taps(self.blocks.model, sites, observe, gradient, tap, taken.observe_routing)

    def _look(self, what: str = "an output or a gradient", *, matrices: bool = False) -> None:
        suspect = self.accumulator.first_not_finite(matrices=matrices)
        if suspect is not None:
            raise overflow(what, suspect)

    def _count(self) -> None:
        self.done += 1
        if self.on_share is not None:
            self.on_share(self.done, self.total)
