"""New down columns of one FFN, from sums over tokens to fit and tokens to judge by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffnscope.apply.ffn_tokens import FFNTokens
from ffnscope.apply.refit import DAMPING, Moments, choose_damping, output_error, refit_down
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
    """Least squares for the kept columns; ``sums`` is used up.

    A damping of None is chosen on the held-out tokens (1e-2 without any), and then all tokens are fitted. Where the
    held-out error is lowest with the old columns, they stay. An FFN without a token keeps all its channels as they are.

    Memory beside the sums: see `refit_down`.

    Args:
        down: dense weights [d_model, d_ff].
        kept: sorted indices [k].
        sums: see `SiteSums`.
        damping: see `refit_down`.

    Raises:
        NonFiniteError: the sums are not finite.
    """
    fit, held = sums.fit.moments, sums.held_out.moments
    judge = fit if held is None else held
    if judge is None:
        return Columns(torch.arange(down.shape[1]), down.clone(), {"unreached": True, "tokens": 0})
    nothing = kept[:0]
    before = output_error(down, down[:, kept], kept, judge)
    power = output_error(down, down[:, nothing], nothing, judge)
    chosen, after = damping, None
    if chosen is None and fit is not None and held is not None:
        chosen, errors = choose_damping(down, kept, fit, held)
        after = errors[chosen]
    chosen = DAMPING if chosen is None else chosen
    held_out = after is not None
    tokens = (0 if fit is None else fit.n_tokens) + (0 if held is None else held.n_tokens)
    new = down[:, kept].clone()
    refitted = after is None or after <= before
    if refitted:
        total = sums.joined()
        assert total is not None, "there are tokens"
        new = refit_down(down, kept, total, chosen)
        after = output_error(down, new, kept, total) if after is None else after
    facts = {
        "tokens": tokens,
        "damping": chosen,
        "refitted": refitted,
        "held_out": held_out,
        "power": power,
        "error_before": before,
        "error_after": after if refitted else before,
    }
    return Columns(kept, new.to(down.dtype), facts)
