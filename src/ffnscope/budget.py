"""How much to remove: an argument type, beside the nouns of `ffnscope.types`, which also give it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ffnscope.errors import UsageError


@dataclass(frozen=True, slots=True)
class Budget:
    """How much to remove.

    Attributes:
        sparsity: fraction of channels to remove, in [0, 1).
        multiple_of: kept widths are multiples of this (kernels like 64 or 128).
        min_width: no site keeps fewer channels than this.
        min_keep: no site keeps less than this: a share of its channels in [0, 1], or a whole number of them above 1;
            or such floors by name, ``{"model.layers.0.mlp": 0.8}``. A name may be a pattern (``*``, ``[a-b]``); of
            several that match a site, the highest floor counts.
    """

    sparsity: float
    multiple_of: int = 1
    min_width: int = 1
    min_keep: float | Mapping[str, float] = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise UsageError(f"sparsity must be in [0, 1), the fraction of channels to remove; got {self.sparsity:g}.")
        if self.multiple_of < 1 or self.min_width < 1:
            raise UsageError(
                f"multiple_of and min_width must be at least 1; got {self.multiple_of} and {self.min_width}."
            )
        for floor in self.min_keep.values() if isinstance(self.min_keep, Mapping) else (self.min_keep,):
            if not (0 <= floor <= 1 or (floor > 1 and float(floor).is_integer())):
                raise UsageError(
                    f"min_keep must be a share of the channels in [0, 1], or a whole number of channels; got {floor:g}."
                )
