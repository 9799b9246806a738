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

    def rows(self, plan: PruningPlan | None = None) -> list[dict[str, Any]]:
        """One row per measured point: site, layer, d_ff, width and rise; with a plan also the width that it chose."""
        return [
            {
                "site": site.name,
                "layer": site.layer,
                "d_ff": site.d_ff,
                "width": width,
                "rise": rise,
                "chosen": None if plan is None or site not in plan.kept else plan.kept[site].numel(),
            }
            for site, (widths, rises) in self.points.items()
            for width, rise in zip(widths.tolist(), rises.tolist(), strict=True)
        ]


def write_curves(path: Path, curves: Curves, model_hash: str) -> None:
    """Save curves as safetensors, with sites, unit, facts and the hash of the model's weights in the header.

    Raises:
        ArtifactError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for site, (widths, rise) in curves.points.items():
        tensors |= {f"widths/{site.name}": widths, f"rise/{site.name}": rise}
    sites = [asdict(site) for site in curves.points]
    header = {"kind": KIND, "sites": sites, "unit": curves.unit, "facts": dict(curves.facts), "model": model_hash}
    write_tensors(path, tensors, header)


def read_curves(path: Path) -> tuple[Curves, str]:
    """Load what `write_curves` wrote, with the hash of the weights; raises ArtifactError for any other file."""
    tensors, header = read_tensors(path)
    expect_kind(path, header, KIND)
    with complete(path, KIND):
        sites = [FFNSite(**row) for row in header["sites"]]
        points = {site: (tensors[f"widths/{site.name}"], tensors[f"rise/{site.name}"]) for site in sites}
        return Curves(points, header["unit"], header["facts"]), str(header["model"])
