"""Loss curves: what it costs to leave a site with so many channels. Data for allocators, measured in `analyze`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.io import complete, expect_kind, read_tensors, write_tensors
from ffnscope.types import FFNSite, PruningPlan

KIND = "curves"


@dataclass(frozen=True, slots=True, eq=False)
class Curves:
    """Rise of the loss by width, for every site.

    Attributes:
        points: site -> widths [n] int64, rising, below d_ff, and the rise [n] over the dense model at each of them.
        unit: of the rise, such as "nats per token".
        facts: how it was measured, and the hash of the weights, ``model``.
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

    def rows(self, plan: PruningPlan | None = None) -> list[dict[str, Any]]:
        """One row per measured point: site, layer, d_ff, width, rise; and what a plan chose, with its rise."""
        found: list[dict[str, Any]] = []
        for site, (widths, rises) in self.points.items():
            chosen = None if plan is None or site not in plan.kept else plan.kept[site].numel()
            at = None if chosen is None else float(self.at(site, torch.tensor([chosen])))
            known = {"site": site.name, "layer": site.layer, "d_ff": site.d_ff}
            for width, rise in zip(widths.tolist(), rises.tolist(), strict=True):
                found.append({**known, "width": width, "rise": rise, "chosen": chosen, "chosen_rise": at})
        return found


def write_curves(path: Path, curves: Curves) -> None:
    """Save curves as safetensors, with sites, unit and facts in the header.

    Raises:
        ArtifactError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for site, (widths, rise) in curves.points.items():
        tensors |= {f"widths/{site.name}": widths, f"rise/{site.name}": rise}
    sites = [asdict(site) for site in curves.points]
    write_tensors(path, tensors, {"kind": KIND, "sites": sites, "unit": curves.unit, "facts": dict(curves.facts)})


def read_curves(path: Path) -> Curves:
    """Load what `write_curves` wrote; raises ArtifactError for any other file."""
    tensors, header = read_tensors(path)
    expect_kind(path, header, KIND)
    with complete(path, KIND):
        sites = [FFNSite(**row) for row in header["sites"]]
        points = {site: (tensors[f"widths/{site.name}"], tensors[f"rise/{site.name}"]) for site in sites}
        return Curves(points, header["unit"], header["facts"])
