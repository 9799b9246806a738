"""Least squares for the down projection of the channels that stay. Tensors only: no model.

With h the channels of a token, t the output that is wanted (without the bias of down) and S the kept channels, the new
columns W' [d_model, k] minimise

    sum over tokens ||t - W' h_S||^2 + damping n m ||W' - W_S||^2,      m = mean of E[h_j^2] over S

so W' = W_S + (C_S - W_S H_SS) (H_SS + damping n m I)^-1 with H = sum h h^T and C = sum t h^T. The penalty pulls towards
the original weights. GRAIL (arXiv:2602.23795) and MoDeGPT pull towards zero, which makes the strength matter much more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnscope.errors import NonFiniteError, UsageError

DAMPING = 1e-2
"""Where no tokens are held out to choose it."""
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1)
_BLOCK = 1024
_ATTEMPTS = 6


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums over the tokens that one FFN saw.

    Attributes:
        second: sum of h h^T, [d_ff, d_ff].
        n_tokens: how many tokens.
        shift: sum of (t - W h) h^T, [d_model, d_ff], where the wanted output t is not what the FFN itself puts out on
            these tokens; None where it is.
        shift_sq: sum of (t - W h)^2 by output, [d_model]; needed for errors where ``shift`` is given.
    """

    second: Tensor
    n_tokens: int
    shift: Tensor | None = None
    shift_sq: Tensor | None = None

    def __post_init__(self) -> None:
        width = self.second.shape[0]
        if self.second.shape != (width, width) or (self.shift is not None and self.shift.shape[1] != width):
            raise UsageError(
                f"moments disagree: second {tuple(self.second.shape)}, shift "
                f"{None if self.shift is None else tuple(self.shift.shape)}; expected [d_ff, d_ff], [d_model, d_ff]."
            )
        if (self.shift is None) != (self.shift_sq is None):
            raise UsageError("moments need both shift and shift_sq, or neither.")

    def __add__(self, other: Moments) -> Moments:
        """Join the sums over two disjoint sets of tokens."""
        if self.shift is None or self.shift_sq is None or other.shift is None or other.shift_sq is None:
            return Moments(self.second + other.second, self.n_tokens + other.n_tokens)
        shift, square = self.shift + other.shift, self.shift_sq + other.shift_sq
        return Moments(self.second + other.second, self.n_tokens + other.n_tokens, shift, square)


def refit_down(down: Tensor, kept: Tensor, moments: Moments, damping: float = DAMPING) -> Tensor:
    """Return new columns of the kept channels, [d_model, k], in the dtype of the moments.

    Memory beside the arguments: 2 k^2 + 3 d_model k numbers, and a block of 1,024 rows of ``second``.

    Args:
        down: [d_model, d_ff], the dense weights.
        kept: sorted indices [k].
        moments: sums over calibration tokens; fewer than about 4 d_ff of them fit noise.
        damping: pull towards the original weights, as a share of the mean power of the kept channels. It is raised
            tenfold, up to six times, where the factorisation fails.

    Raises:
        UsageError: a damping that is not positive and finite.
        NonFiniteError: the sums are not finite, or no damping helps.
    """
    return _Normal.of(down, kept, moments).solved(damping)


def output_error(down: Tensor, new: Tensor, kept: Tensor, moments: Moments) -> float:
    """Mean over tokens of ||t - new h_S||^2, the squared error of the FFN's output.

    Args:
        down: [d_model, d_ff], the dense weights.
        new: [d_model, k], what replaces the kept columns.
        kept: sorted indices [k].
        moments: of the tokens to judge by: with those of other tokens than the fit used, this is a held-out error.
    """
    change = down.to(moments.second).clone()
    change[:, kept.to(change.device)] -= new.to(change)  # W h - new h_S = change h
    error = ((change @ moments.second) * change).sum()
    if moments.shift is not None and moments.shift_sq is not None:
        error = error + 2 * (change * moments.shift).sum() + moments.shift_sq.sum()
    return float(error.clamp_min(0)) / moments.n_tokens


def choose_damping(
    down: Tensor, kept: Tensor, fit: Moments, held_out: Moments, choices: Sequence[float] = DAMPINGS
) -> tuple[float, dict[float, float]]:
    """Return the damping with the lowest error on held-out tokens, and the error of each choice.

    Ties, such as in an FFN that is never active, go to the largest damping.
    """
    normal = _Normal.of(down, kept, fit)
    errors = {d: output_error(down, normal.solved(d), kept, held_out) for d in sorted(choices)}
    return min(reversed(errors), key=lambda d: errors[d]), errors


def mean_bias(down: Tensor, kept: Tensor, mean: Tensor) -> Tensor:
    """Bias [d_model] that replaces the removed channels by their mean: the removed columns times ``mean`` [d_ff].

    FLAP's compensation (arXiv:2312.11983, section 3.3).
    """
    removed = torch.ones(down.shape[1], dtype=torch.bool, device=down.device)
    removed[kept.to(down.device)] = False
    return down.to(mean)[:, removed.to(mean.device)] @ mean[removed.to(mean.device)]


@dataclass(frozen=True, slots=True, eq=False)
class _Normal:
    """The normal equations of one fit, which are the same for every damping.

    Attributes:
        old: dense columns of the kept channels, [d_model, k].
        gram: sum of h_S h_S^T, [k, k].
        missing: C_S - W_S H_SS, [d_model, k].
    """

    old: Tensor
    gram: Tensor
    missing: Tensor

    @classmethod
    def of(cls, down: Tensor, kept: Tensor, moments: Moments) -> _Normal:
        down, kept = down.to(moments.second), kept.to(moments.second.device)
        return cls(down[:, kept], _rows(moments.second, kept, kept), _residual(down, kept, moments))

    def solved(self, damping: float) -> Tensor:
        """New columns [d_model, k]; see `refit_down`."""
        if not 0 < damping < float("inf"):
            raise UsageError(f"damping must be positive, a share of the mean power of the channels; got {damping:g}.")
        scale = float(self.gram.diagonal().mean())
        if scale == 0:
            return self.old.clone()
        for attempt in range(_ATTEMPTS):
            pulled = self.gram.clone()
            pulled.diagonal().add_(damping * 10.0**attempt * scale)
            factor, failed = torch.linalg.cholesky_ex(pulled)
            del pulled
            if not int(failed):
                change = torch.cholesky_solve(self.missing.T, factor).T
                if bool(torch.isfinite(change).all()):
                    return change.add_(self.old)
        raise NonFiniteError(
            f"least squares on {len(self.gram)} channels failed with every damping from {damping:g} on: the sums over "
            "the calibration are not finite, or the weights are not."
        )


def _residual(down: Tensor, kept: Tensor, moments: Moments) -> Tensor:
    """C_S - W_S H_SS, [d_model, k]: what the kept channels with their old weights miss, by channel."""
    removed = torch.ones(down.shape[1], dtype=torch.bool, device=down.device)
    removed[kept] = False
    found = torch.zeros(down.shape[0], kept.numel(), dtype=down.dtype, device=down.device)
    for index in removed.nonzero().flatten().split(_BLOCK):
        found += down[:, index] @ _rows(moments.second, index, kept)
    return found if moments.shift is None else found + moments.shift.to(found)[:, kept]


def _rows(second: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """second[rows][:, columns], without all columns of more than a block of rows at a time."""
    return torch.cat([second[part][:, columns] for part in rows.split(_BLOCK)]) if rows.numel() else second[:0, columns]
