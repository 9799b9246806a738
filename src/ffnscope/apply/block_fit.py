"""New down columns of one FFN, from sums over tokens to fit and tokens to judge by, for both kinds of refit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffnscope.apply.ffn_tokens import FFNTokens
from ffnscope.apply.profile import RAISED
from ffnscope.apply.refit import DAMPING, DAMPINGS, LeastSquares, Moments, choose_damping
from ffnscope.apply.rows import ChannelRows
from ffnscope.calibrate.statistics import h_outer, xh_outer


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """What was found for one FFN: kept channels [k], their new down columns [d_model, k], and how.

    Where it was trained, also rows of gate and up, and what is added to the bias of down [d_model] where it has one.
    """

    kept: Tensor
    down: Tensor
    facts: Mapping[str, Any]
    rows: ChannelRows | None = None
    bias: Tensor | None = None


@dataclass(slots=True, eq=False)
class RunningMoments:
    """`Moments` that grow batch by batch, in float64; None as long as no token has come."""

    moments: Moments | None = None

    def add(self, h: Tensor, shift: Tensor | None) -> None:
        """Add the rows h [n, d_ff] of n tokens, and of what is wanted beyond the FFN's own output [n, d_model]."""
        if not len(h):
            return
        old = self.moments
        total = h.new_zeros(h.shape[1], h.shape[1], dtype=torch.float64) if old is None else old.second
        h_outer(total, h)
        n_tokens = len(h) + (0 if old is None else old.n_tokens)
        if shift is None:
            self.moments = Moments(total, n_tokens)
            return
        cross = h.new_zeros(shift.shape[1], h.shape[1], dtype=torch.float64)
        square = cross.new_zeros(shift.shape[1])
        if old is not None and old.shift is not None and old.shift_sq is not None:
            cross, square = old.shift, old.shift_sq
        xh_outer(cross, shift, h)
        self.moments = Moments(total, n_tokens, cross, square.add_(shift.double().square().sum(0)))


@dataclass(slots=True, eq=False)
class SiteSums:
    """Sums over the tokens of one FFN: those to fit, and those held out to choose the damping.

    ``tokens`` are the tokens themselves, where they are kept to train on.
    """

    fit: RunningMoments
    held_out: RunningMoments
    tokens: FFNTokens | None = None

    @classmethod
    def empty(cls, kept_tokens: int | None = None) -> SiteSums:
        """Sums over no token; of ``kept_tokens`` that will come, if given, each is kept."""
        return cls(RunningMoments(), RunningMoments(), None if kept_tokens is None else FFNTokens(kept_tokens))

    def add(self, h: Tensor, shift: Tensor | None, x: Tensor | None, *, held_out: bool) -> None:
        """Add tokens: channels [n, d_ff], what is wanted beyond the output, the input [n, d_model] where it is kept."""
        (self.held_out if held_out else self.fit).add(h, shift)
        if self.tokens is not None:
            assert x is not None, "inputs are kept"
            self.tokens.add(x, shift, held_out=held_out)

    def joined(self) -> Moments | None:
        """Sums over all tokens, in the place of those to fit; what is held out stays as it is."""
        fit, held = self.fit.moments, self.held_out.moments
        if fit is None or held is None:
            return held if fit is None else fit
        for total, part in ((fit.second, held.second), (fit.shift, held.shift), (fit.shift_sq, held.shift_sq)):
            if total is not None and part is not None:
                total += part
        return Moments(fit.second, fit.n_tokens + held.n_tokens, fit.shift, fit.shift_sq)


def fit_columns(down: Tensor, kept: Tensor, sums: SiteSums, damping: float | None) -> Columns:
    """Least squares for the kept columns by `refitted`; ``sums`` is used up.

    An FFN without a token keeps all its channels as they are.

    Args:
        down: dense weights [d_model, d_ff].
        kept: sorted indices [k].
        sums: see `SiteSums`.
        damping: see `refit_down`.

    Raises:
        NonFiniteError: the sums are not finite.
    """
    if sums.fit.moments is None and sums.held_out.moments is None:
        return Columns(torch.arange(down.shape[1]), down.clone(), {"unreached": True, "tokens": 0})
    fit, held = sums.fit.moments, sums.held_out.moments
    if fit is None:
        fit, held = held, None
    assert fit is not None, "there are tokens"
    new, facts = refitted(down, kept, fit, held, damping, lambda: sums.joined() or fit)
    return Columns(kept, new.to(down.dtype), facts)


def refitted(
    down: Tensor,
    kept: Tensor,
    fit: Moments,
    held_out: Moments | None,
    damping: float | None,
    join: Callable[[], Moments],
) -> tuple[Tensor, dict[str, Any]]:
    """New columns of the kept channels [d_model, k], and what is told of them.

    A damping of None is chosen on the held-out tokens (1e-2 without any), and then all tokens are fitted. Where the
    held-out error is lowest with the old columns, they stay. The facts: ``tokens`` in all; ``damping``, and
    ``damping_raised_to`` where the factorisation needed more; ``refitted`` unless the old columns stay; ``power``, the
    mean square of the output that is wanted; ``error_without`` and ``error``, the squared error of the output without
    and with the refit as shares of the power; and ``held_out``, whether these were taken on held-out tokens. The error
    with the refit is then that of columns that were fitted to the others, and the result is fitted to all.

    Memory beside the sums: see `refit_down`.

    Args:
        down: dense weights [d_model, d_ff].
        kept: sorted indices [k].
        fit: sums over the tokens to fit.
        held_out: sums over others that choose the damping, or None.
        damping: see `refit_down`.
        join: gives the sums over both, once those of ``fit`` are not needed any more.

    Raises:
        NonFiniteError: the sums are not finite.
    """
    down = down.to(fit.second)  # once for all problems
    problem = judge = LeastSquares.of(down, kept, fit)
    told: dict[str, Any] = {"refitted": True, "held_out": False}
    if held_out is not None and held_out.n_tokens:
        judge = LeastSquares.of(down, kept, held_out)
        damping, errors = choose_damping(problem, judge, DAMPINGS if damping is None else (damping,))
        told = {"refitted": errors[damping] <= judge.without, "held_out": True}
        new, used = LeastSquares.of(down, kept, join()).solve(damping) if told["refitted"] else (judge.old, damping)
        error = min(errors[damping], judge.without)
    else:
        damping = DAMPING if damping is None else damping
        new, used = problem.solve(damping)
        error = problem.error(new)
    power, without = judge.power, judge.without
    shares = {"error_without": without / power if power else 0.0, "error": error / power if power else 0.0}
    tokens = fit.n_tokens + (0 if held_out is None else held_out.n_tokens)
    if used != damping:
        told[RAISED] = used
    return new, {"tokens": tokens, "damping": damping, **told, "power": power, **shares}
