"""How far a selection is from the best one of the same size: the channels with the largest contributions."""

from __future__ import annotations

import torch
from torch import Tensor

from ffnscope.sparse.measures import Truth, missed_mass, relative_error
from ffnscope.sparse.policies import ranks

GAPS = ("missed_mass_gap", "error_gap", "density_ratio")
"""Names of what is compared with the oracle for every token."""


def oracle_gaps(mask: Tensor, truth: Truth) -> dict[str, Tensor]:
    """Compare a mask [T, d_ff] with the oracle, token by token; name of `GAPS` -> [T] float64.

    ``missed_mass_gap`` and ``error_gap`` are what the mask misses (and its relative error) more than as many channels
    of that token chosen by their contributions; ``density_ratio`` is how many times as many channels it keeps as the
    oracle needs to miss no more mass (one at least); 1 where it keeps none.
    """
    rank = ranks(truth.contributions)
    best = rank <= mask.sum(-1, keepdim=True)
    gap = missed_mass(mask, truth.contributions) - missed_mass(best, truth.contributions)
    error = relative_error(mask, truth.h, truth.down) - relative_error(best, truth.h, truth.down)
    return {
        "missed_mass_gap": gap.cpu(),
        "error_gap": error.cpu(),
        "density_ratio": _density_ratio(mask, truth.contributions).cpu(),
    }


def _density_ratio(mask: Tensor, contributions: Tensor) -> Tensor:
    """Channels of the mask over the fewest that hold as much mass, [T]."""
    ordered = contributions.double().sort(dim=-1, descending=True).values.cumsum(-1)
    held = (contributions.double() * mask).sum(-1, keepdim=True)
    needed = (ordered < held * (1 - 1e-12)).sum(-1) + 1
    kept = mask.sum(-1).double()
    return torch.where(kept > 0, kept / needed, 1.0)
