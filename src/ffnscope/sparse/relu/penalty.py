"""The L1 penalty on channel activations, and how its weight grows over the training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.calibrate.rows import TokenRows
from ffnscope.errors import UsageError
from ffnscope.ffn.projection import channel_readers
from ffnscope.types import FFNSite


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the training.

    Attributes:
        weight: of the penalty at its end, 0 or more.
        until: share of the steps at which it ends, in (0, 1].
    """

    weight: float
    until: float


PROSPARSE = (
    Stage(0.0, 5000 / 16500),
    Stage(5e-3, 6000 / 16500),
    Stage(5e-2, 10000 / 16500),
    Stage(5e-2, 12000 / 16500),
    Stage(2e-1, 16000 / 16500),
    Stage(2e-1, 1.0),
)
"""The stages of ProSparse-7B (arXiv:2402.13516), as shares of its 16,500 steps."""


@dataclass(frozen=True, slots=True)
class ProgressiveL1:
    """Weight of the penalty by step, as in ProSparse.

    Without weight first; constant in the first stage that has one (its warm-up); in every later stage it moves along
    half a period of a sine from the weight before to its own.

    Raises:
        UsageError: no stages, ends that do not rise up to 1, or an impossible weight.
    """

    stages: Sequence[Stage] = PROSPARSE

    def __post_init__(self) -> None:
        ends = [stage.until for stage in self.stages]
        if not ends or ends[-1] != 1 or any(a >= b for a, b in zip([0.0, *ends], ends, strict=False)):
            raise UsageError(f"stages must end at rising shares of the steps, the last one at 1; got {ends}.")
        for stage in self.stages:
            if not 0 <= stage.weight < float("inf"):
                raise UsageError(f"the weight of a stage must be 0 or more, and finite; got {stage.weight:g}.")

    @staticmethod
    def up_to(weight: float) -> ProgressiveL1:
        """The stages of ProSparse, scaled such that the last weight is this one; raises UsageError below 0."""
        if not 0 <= weight < float("inf"):
            raise UsageError(f"the last weight of the penalty must be 0 or more, and finite; got {weight:g}.")
        return ProgressiveL1([Stage(s.weight / PROSPARSE[-1].weight * weight, s.until) for s in PROSPARSE])

    def weight(self, done: float) -> float:
        """Weight at a share of the steps that is done, in [0, 1]."""
        number = next((i for i, stage in enumerate(self.stages) if done < stage.until), len(self.stages) - 1)
        stage, before = self.stages[number], self.stages[number - 1] if number else Stage(0.0, 0.0)
        if before.weight == 0:
            return stage.weight
        rise = (1 - math.cos(math.pi * (done - before.until) / (stage.until - before.until))) / 2
        return before.weight + rise * (stage.weight - before.weight)


@dataclass(slots=True, eq=False)
class Penalty:
    """Mean |h| of a forward, with its graph, and the share of zeros.

    Attributes:
        sites: the FFNs.
    """

    sites: Sequence[FFNSite]
    _sizes: dict[FFNSite, Tensor] = field(default_factory=dict[FFNSite, Tensor])
    _zeros: dict[FFNSite, Tensor] = field(default_factory=dict[FFNSite, Tensor])

    @contextlib.contextmanager
    def of(self, model: nn.Module, valid: Tensor) -> Generator[Penalty]:
        """Within the block a forward on tokens ``valid`` [batch, T] is measured."""
        rows = TokenRows(valid)
        self._sizes, self._zeros = {}, {}

        def hook(site: FFNSite) -> Any:
            def note(module: nn.Module, args: tuple[Any, ...]) -> None:
                h = rows.take(site, args[0])
                self._sizes[site] = h.float().abs().mean()
                self._zeros[site] = (h.detach() == 0).float().mean()

            return note

        handles: list[Any] = []
        try:
            for site in self.sites:
                handles += [m.register_forward_pre_hook(hook(site)) for m in channel_readers(model, site)]
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def size(self) -> Tensor:
        """Mean over FFNs of the mean |h| over tokens and channels; differentiable."""
        return torch.stack(list(self._sizes.values())).mean()

    def zeros(self) -> float:
        """Share of exact zeros, mean over FFNs."""
        return float(torch.stack(list(self._zeros.values())).mean())
