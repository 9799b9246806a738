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
from functools import cached_property

import torch
from torch import Tensor

from ffnscope.errors import NonFiniteError, UsageError

DAMPING = 1e-2
"""Where no tokens are held out to choose it."""
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1)
_BLOCK = 256
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

    Memory beside the arguments, in the dtype of the moments: k^2 + 4 d_model k + d_model d_ff numbers (the last
    where ``down`` has another dtype), and a block of 256 rows of ``second``.

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
    return LeastSquares.of(down, kept, moments).solved(damping)


def choose_damping(
    fit: LeastSquares, held_out: LeastSquares, choices: Sequence[float] = DAMPINGS
) -> tuple[float, dict[float, float]]:
    """Return the damping with the lowest error on held-out tokens, and the error of each choice.

    Ties, such as in an FFN that is never active, go to the largest damping.
    """
    errors = {d: held_out.error(fit.solved(d)) for d in sorted(choices)}
    return min(reversed(errors), key=lambda d: errors[d]), errors


def mean_bias(down: Tensor, kept: Tensor, mean: Tensor) -> Tensor:
    """Bias [d_model] that replaces the removed channels by their mean: the removed columns times ``mean`` [d_ff].

    FLAP's compensation (arXiv:2312.11983, section 3.3).
    """
    gone = _removed(down, kept).to(mean.device)
    return down.to(mean)[:, gone] @ mean[gone]


@dataclass(frozen=True, eq=False)
class LeastSquares:
    """One FFN on some tokens: its new columns for any damping, and the error of any columns; they share products.

    Attributes:
        down: the dense weights, [d_model, d_ff].
        kept: S, sorted indices [k].
        moments: of the tokens to fit, or to judge by.
    """

    down: Tensor
    kept: Tensor
    moments: Moments

    @classmethod
    def of(cls, down: Tensor, kept: Tensor, moments: Moments) -> LeastSquares:
        """Take weights and indices to the dtype and the device of the moments; without a copy if they have these."""
        return cls(down.to(moments.second), kept.to(moments.second.device), moments)

    @cached_property
    def old(self) -> Tensor:
        """Dense columns of the kept channels, [d_model, k]."""
        return self.down[:, self.kept]

    @cached_property
    def missing(self) -> Tensor:
        """C_S - W_S H_SS, [d_model, k]: what the kept channels with their old weights miss, by channel."""
        gone = _removed(self.down, self.kept)
        found = _product(self.down[:, gone], self.moments.second, gone, self.kept)
        shift = self.moments.shift
        return found if shift is None else found.add_(shift.to(found)[:, self.kept])

    @cached_property
    def without(self) -> float:
        """Mean over tokens of ||t - W_S h_S||^2: the squared error of the output with the old columns."""
        gone = _removed(self.down, self.kept)
        lost = self.down[:, gone]
        error = (_product(lost, self.moments.second, gone, gone) * lost).sum()
        shift, square = self.moments.shift, self.moments.shift_sq
        if shift is not None and square is not None:
            error = error + square.sum() + 2 * (lost * shift[:, gone]).sum()
        return float(error.clamp_min(0)) / self.moments.n_tokens

    @cached_property
    def power(self) -> float:
        """Mean over tokens of ||t||^2: the error without any channel."""
        return self.error(torch.zeros_like(self.old))

    def error(self, new: Tensor) -> float:
        """Mean over tokens of ||t - W' h_S||^2 for columns W' [d_model, k]."""
        change = new.to(self.old) - self.old
        step = _product(change, self.moments.second, self.kept, self.kept).sub_(self.missing, alpha=2)
        return max(0.0, self.without + float((step * change).sum()) / self.moments.n_tokens)

    def solved(self, damping: float) -> Tensor:
        """New columns [d_model, k]; see `refit_down`."""
        return self.solve(damping)[0]

    def solve(self, damping: float) -> tuple[Tensor, float]:
        """New columns [d_model, k], and the damping that they have: a higher one where the factorisation failed."""
        if not 0 < damping < float("inf"):
            raise UsageError(f"damping must be positive, a share of the mean power of the channels; got {damping:g}.")
        scale = float(self.moments.second.diagonal()[self.kept].mean())
        if scale == 0:
            return self.old.clone(), damping
        for attempt in range(_ATTEMPTS):
            raised = damping * 10.0**attempt
            factor = _factor(self.moments.second, self.kept, raised * scale)
            if factor is not None:
                change = _divided(self.missing, factor)
                if bool(torch.isfinite(change).all()):
                    return change.add_(self.old), raised
        raise NonFiniteError(
            f"least squares on {len(self.kept)} channels failed with every damping from {damping:g} on: the sums over "
            "the calibration are not finite, or the weights are not."
        )


def _removed(down: Tensor, kept: Tensor) -> Tensor:
    """Indices of the channels that do not stay."""
    removed = torch.ones(down.shape[1], dtype=torch.bool, device=down.device)
    removed[kept.to(down.device)] = False
    return removed.nonzero().flatten()


def _product(left: Tensor, second: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """left @ second[rows][:, columns], of which only a block of rows is copied at a time."""
    found = left.new_zeros(left.shape[0], columns.numel())
    for part, index in zip(left.split(_BLOCK, 1), rows.split(_BLOCK), strict=True):
        found += part @ second[index][:, columns]
    return found


def _factor(second: Tensor, kept: Tensor, penalty: float) -> Tensor | None:
    """Lower Cholesky factor of second[kept][:, kept] + penalty I, or None; it takes k^2 numbers in all."""
    gram = second.new_empty(len(kept), len(kept))
    for rows, index in zip(gram.split(_BLOCK), kept.split(_BLOCK), strict=True):
        rows.copy_(second[index][:, kept])
    gram.diagonal().add_(penalty)
    # transposed, a symmetric matrix lies as LAPACK wants it, so that it is factored where it is
    factor, failed = gram.T, torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    return None if int(failed) else factor


def _divided(left: Tensor, factor: Tensor) -> Tensor:
    """left (L L^T)^-1 of the lower factor L [k, k], for left [d_model, k]; `cholesky_solve` would copy L."""
    half = torch.linalg.solve_triangular(factor.T, left, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False)
