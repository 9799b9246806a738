"""One batch of a calibration pass, and how it is announced to the sums."""

from __future__ import annotations

from dataclasses import dataclass

from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.calibrate.windows import Windows


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One batch of the pass, and whether it observes activations, gradients or both."""

    batch: Windows
    forward: bool
    backward: bool


def begin_step(accumulator: Accumulator, step: Step, *, forward: bool, backward: bool) -> None:
    """Announce the batch of a step, of which activations (``forward``) or gradients come now, or both."""
    batch = step.batch
    marks = {"targets": batch.targets, "documents": batch.document}
    accumulator.begin(batch.valid, batch.n_targets, **marks, forward=forward, backward=backward)
