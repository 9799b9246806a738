"""Products of an input with matrices of an FFN that whoever selects has made, so that the runtime makes them once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Products:
    """What is known of some tokens.

    Attributes:
        gate: gate x with its bias [T, d_ff], or [T, k] of some channels; None where it has not been made.
        up: the same of up x.
    """

    gate: Tensor | None = None
    up: Tensor | None = None

    def __bool__(self) -> bool:
        """Whether anything is known."""
        return self.gate is not None or self.up is not None

    def at(self, index: Tensor, dtype: torch.dtype) -> Products:
        """Those of the channels ``index`` [k], rounded to a dtype."""
        gate, up = (None if one is None else one[:, index].to(dtype) for one in (self.gate, self.up))
        return Products(gate, up)
