"""Which channels of a token should be kept: sets that recall and precision are measured against."""

from __future__ import annotations

from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.sparse.policies import Nucleus, TopK


def top_mass(contributions: Tensor, missed: float) -> Tensor:
    """The fewest channels that hold 1 - ``missed`` of a token's contributions, mask [T, d_ff].

    Args:
        contributions: c [T, d_ff] (`FFN.contributions`).
        missed: share of the mass that may be missed, in (0, 1).

    Raises:
        UsageError: a share outside of (0, 1); for no loss at all there is `nonzero`.
    """
    if not 0 < missed < 1:
        raise UsageError(
            f"missed must be in (0, 1), the share of the contributions outside of the set; got {missed:g}. For exact "
            "zeros of a ReLU model use nonzero."
        )
    return Nucleus().select(contributions, 1 - missed)


def largest(contributions: Tensor, density: float) -> Tensor:
    """The share ``density`` of the channels (rounded) with the largest contributions of each token, mask [T, d_ff].

    Raises:
        UsageError: a density outside of [0, 1].
    """
    if not 0 <= density <= 1:
        raise UsageError(f"density must be in [0, 1], the share of channels to keep; got {density:g}.")
    return TopK().select(contributions, round(density * contributions.shape[-1]))


def nonzero(contributions: Tensor) -> Tensor:
    """Channels that contribute anything, mask [T, d_ff]: the exact set of a ReLU model."""
    return contributions != 0
