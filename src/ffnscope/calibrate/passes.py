"""Run the steps of a calibration pass: one by one, block by block, or shared by several processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.calibrate.checkpoint import Checkpoint
from ffnscope.calibrate.observe import not_finite, observe_batch
from ffnscope.calibrate.parallel import Ranks, shared
from ffnscope.calibrate.steps import Step, begin_step
from ffnscope.calibrate.sums import Surroundings
from ffnscope.calibrate.sweep import sweep
from ffnscope.calibrate.sweep_files import SweepFiles
from ffnscope.calibrate.taps import SignalTap
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.streamed import is_streamed
from ffnscope.types import FFNSite

OnBatch = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Text:
    """What processes share.

    Attributes:
        steps: those that are not done.
        start: number of the first of them.
        every: windows between two savings of sums; None = never.
        kept: files of a streamed pass, if it can go on after an interrupt.
    """

    steps: Sequence[Step]
    start: int
    every: int | None
    kept: SweepFiles | None

    def files(self, ranks: Ranks) -> SweepFiles | None:
        """Those of this process."""
        return None if self.kept is None else self.kept.of_share(self.start, ranks.rank, ranks.size)


@dataclass(frozen=True, slots=True)
class _Share:
    """What a process runs of some steps.

    Attributes:
        ranks: its place among the others.
        files: those from which a streamed share goes on, and in which it is saved.
        final: whether no steps follow.
    """

    ranks: Ranks
    files: SweepFiles | None
    final: bool


def run_steps(
    model: nn.Module,
    sites: Sequence[FFNSite],
    steps: Sequence[Step],
    accumulator: Accumulator,
    saver: Checkpoint | None,
    on_batch: OnBatch | None,
) -> None:
    """Run what a checkpoint has not, with the other processes where there are some."""
    start = saver.resume(accumulator) if saver else 0
    if start == len(steps):
        return
    every = saver.every if saver else None
    names = [one.name for one in (*accumulator.forward, *accumulator.backward)]
    around = accumulator.sums.around
    kept = saver.blocks if saver and is_streamed(model) else None
    text = _Text(steps[start:], start, every, kept)
    ranks = shared(model, serve_steps, list(sites), names, accumulator.core, around, text)
    total = sum(s.batch.n_tokens for s in steps)
    done = sum(s.batch.n_tokens for s in steps[:start])
    within = on_batch is not None and (is_streamed(model) or ranks.size > 1)
    with frozen(model):
        for group in _groups(steps[start:], ranks, every, streamed=is_streamed(model)):
            here = sum(s.batch.n_tokens for s in group)
            start += len(group)
            tell = partial(_tell, on_batch, done, here, total) if on_batch is not None and within else None
            share = _Share(ranks, text.files(ranks), final=start == len(steps))
            _run_group(model, sites, group, accumulator, share, tell)
            done += here
            if saver:
                saver.after(start - 1, sum(len(s.batch) for s in group), accumulator)
            if on_batch is not None and not within:
                on_batch(done, total)


def serve_steps(
    model: nn.Module,
    ranks: Ranks,
    sites: Sequence[FFNSite],
    names: Sequence[str],
    core: Mapping[FFNSite, Tensor],
    around: Surroundings,
    text: _Text,
) -> None:
    """Take a share of the steps that a leading process runs."""
    accumulator = Accumulator(sites, names, core, around)
    groups = _groups(text.steps, ranks, text.every, streamed=is_streamed(model))
    with frozen(model):
        for i, group in enumerate(groups, 1):
            _run_group(model, sites, group, accumulator, _Share(ranks, text.files(ranks), final=i == len(groups)))


def _groups(steps: Sequence[Step], ranks: Ranks, every: int | None, *, streamed: bool) -> list[Sequence[Step]]:
    """Cut steps into those between two moments at which sums are whole in one process and can be saved.

    A single process can save after each step, several when each has run about ``every`` windows. The sums of a streamed
    model are whole at the end only; each process saves its own, and the hidden states, at each block (`SweepFiles`).
    """
    if streamed or (ranks.size > 1 and every is None):
        return [steps]
    if ranks.size == 1:
        return [[step] for step in steps]
    groups: list[Sequence[Step]] = []
    group: list[Step] = []
    for step in steps:
        group.append(step)
        if len(group) % ranks.size == 0 and sum(len(s.batch) for s in group) >= (every or 0) * ranks.size:
            groups.append(group)
            group = []
    return [*groups, group] if group else groups


def _run_group(
    model: nn.Module,
    sites: Sequence[FFNSite],
    group: Sequence[Step],
    accumulator: Accumulator,
    share: _Share,
    tell: OnBatch | None = None,
) -> None:
    """Run this process's share of some steps, and bring the sums of all together in the leader."""
    ranks = share.ranks
    mine = group[ranks.rank :: ranks.size]

    def run() -> None:
        if is_streamed(model):
            if mine:
                sweep(model, sites, mine, accumulator, tell, share.files)
            return
        for i, step in enumerate(mine, 1):
            _run(model, sites, step, accumulator, last=share.final and i == len(mine))
            if tell is not None:
                tell(i, len(mine))

    ranks.agreed(run)
    if ranks.size > 1:
        accumulator.sums.bring_together(ranks)


def _run(model: nn.Module, sites: Sequence[FFNSite], step: Step, accumulator: Accumulator, *, last: bool) -> None:
    begin_step(accumulator, step, forward=step.forward, backward=step.backward)
    observe = accumulator.observe if accumulator.reads_activation else None
    observe_gradient = accumulator.observe_gradient if step.backward else None
    tap = SignalTap(accumulator.observe_signal, accumulator.signals) if accumulator.signals else None
    observe_batch(model, sites, step.batch, observe, observe_gradient, tap, accumulator.observe_routing)
    suspect = accumulator.first_not_finite(matrices=last)
    if suspect is not None:
        raise not_finite(model, sites, step.batch, suspect)


def _tell(on_batch: OnBatch, before: int, here: int, total: int, done: int, of: int) -> None:
    """Tell a share of a group as tokens."""
    on_batch(before + here * done // of, total)
