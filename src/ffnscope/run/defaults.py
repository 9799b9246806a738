"""How much text a pruning calibrates on where nobody says: one place for the commands and the YAML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ffnscope.apply.few_tokens import tokens_wanted
from ffnscope.apply.method import GRADIENT_WINDOWS, Refit
from ffnscope.run.texts import SHIPPED_TEXTS
from ffnscope.types import FFNSite


@dataclass(frozen=True, slots=True)
class TextDefaults:
    """The calibration text of a way to prune.

    Attributes:
        windows: how many; with a least squares more where `enough_windows` says so.
        length: tokens per window.
        backward: windows that also run backward; None = all.
        mixes: whether the default text is mixed with all other shipped texts.
    """

    windows: int
    length: int
    backward: int | None = None
    mixes: bool = False

    def mixed_with(self, name: str) -> tuple[str, ...]:
        """Shipped texts that a default text is mixed with."""
        return tuple(other for other in SHIPPED_TEXTS if other != name) if self.mixes else ()


RANKING = TextDefaults(64, 512)
REFITTING = TextDefaults(128, 256, GRADIENT_WINDOWS, True)
"""As many tokens in more places of more texts: a refit fits what it sees."""


def defaults_of(reconstruct: Refit) -> TextDefaults:
    """The calibration text of a reconstruction, or of none."""
    return RANKING if reconstruct == "none" else REFITTING


def enough_windows(model: nn.Module, sites: Sequence[FFNSite], length: int) -> int:
    """Windows by which every FFN sees 4 tokens per channel, and never fewer than those of `REFITTING`."""
    return max(REFITTING.windows, math.ceil(tokens_wanted(model, sites) / length))
