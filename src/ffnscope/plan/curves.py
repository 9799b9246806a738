"""Loss curves: what it costs to leave a site with so many channels. Data for allocators, measured in `analyze`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.types import FFNSite


@dataclass(frozen=True, slots=True, eq=False)
class Curves:
    """Rise of the loss by width, for every site.

    Attributes:
        points: site -> widths [n] int64, rising, below d_ff, and the rise [n] over the dense model at each of them.
        unit: of the rise, such as "nats per token".
        facts: how it was measured.
    """

    points: Mapping[FFNSite, tuple[Tensor, Tensor]]
    unit: str
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        for site, (widths, rise) in self.points.items():
            fits = widths.dtype == torch.int64 and widths.dim() == 1 and widths.shape == rise.shape and len(widths) > 0
            if not fits or int(widths[0]) < 1 or int(widths[-1]) >= site.d_ff or bool((widths.diff() < 1).any()):
                raise UsageError(
                    f"curve of {site.name}: expected rising widths in [1, {site.d_ff}) and as many values; got "
                    f"{widths.tolist()} and {rise.numel()} values."
                )
            if not bool(torch.isfinite(rise).all()):
                raise NonFiniteError(f"curve of {site.name}: the measured rise is NaN or infinite.")

    def at(self, site: FFNSite, widths: Tensor) -> Tensor:
        """Rise at some widths [n], float64: linear between the measured ones, 0 at d_ff, never falling with removal.

        Below the narrowest measured width the last slope goes on.
        """
        known, rise = self.points[site]
        knots = torch.cat([known, torch.tensor([site.d_ff])]).double()
        values = torch.cat([rise.double().cpu(), torch.zeros(1, dtype=torch.float64)])
        values = values.flip(0).cummax(0).values.flip(0)  # noise must not make a narrower site look better
        right = torch.searchsorted(knots, widths.double()).clamp(1, len(knots) - 1)
        slope = (values[right] - values[right - 1]) / (knots[right] - knots[right - 1])
        return values[right] + slope * (widths.double() - knots[right])
