"""Predictors that compute a part of the FFN exactly: all of it (the oracle), the gate, or up."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from ffnscope.ffn.function import FFN, wide
from ffnscope.registry import predictor
from ffnscope.sparse.ffn import check_input
from ffnscope.sparse.predictors.interface import FitTokens, Predictor, check_gated, needed, token_mean
from ffnscope.sparse.products import Products


class ExactScore(Predictor):
    """A score from exact products with matrices of the FFN, times a weight per channel."""

    weight: Tensor

    def __init__(self, ffn: FFN, reads: Collection[str], weight: Tensor):
        super().__init__(ffn, reads)
        self.register_buffer("weight", wide(weight))

    def forward(self, x: Tensor) -> Tensor:
        """[T, d_model] -> scores [T, d_ff]."""
        return self.score_and_read(x)[0]

    def score_and_read(self, x: Tensor) -> tuple[Tensor, Products]:
        """See `Predictor.score_and_read`."""
        check_input(self.ffn, x)
        ffn = self.ffn
        gate = ffn.activation_input(x) if "gate" in self.reads else None
        up = ffn.up(x) if "up" in self.reads else None
        return self._score(gate, up).abs() * self.weight, Products(gate, up)

    def _score(self, gate: Tensor | None, up: Tensor | None) -> Tensor:
        if gate is None:
            assert up is not None, "it reads one of the two"
            return up if self.ffn.gated else self.ffn.act(up)
        return self.ffn.act(gate) if up is None else self.ffn.act(gate) * up


@predictor("oracle", source="bound of any predictor")
def oracle(ffn: FFN, fit: FitTokens | None = None, *, norm: bool = True) -> Predictor:
    """The true contributions c: what no predictor can beat in missed mass at the same density.

    Args:
        ffn: the FFN.
        fit: not used.
        norm: multiply |h_i| by ||W_down[:, i]||.
    """
    weight = ffn.down_norms if norm else ffn.down_norms.new_ones(ffn.d_ff)
    return ExactScore(ffn, ("gate", "up") if ffn.gated else ("up",), weight)


@predictor("exact_gate", source="CATS (arXiv:2404.08763), CHESS (arXiv:2409.01366)")
def exact_gate(ffn: FFN, fit: FitTokens | None, *, up_size: bool = True, norm: bool = True) -> Predictor:
    """|act(g_i)| from the exact gate, times the usual size of up.

    With neither factor it is the score of CATS, with ``up_size`` alone the square root of that of CHESS. ||W_down|| is
    not in their rules.

    Args:
        ffn: a gated FFN.
        fit: tokens; needed for ``up_size``.
        up_size: multiply by sqrt(E[u_i^2]).
        norm: multiply by ||W_down[:, i]||.

    Raises:
        UsageError: an FFN without a gate, or no tokens.
    """
    check_gated(ffn, "exact_gate")
    weight = ffn.down_norms if norm else ffn.down_norms.new_ones(ffn.d_ff)
    if up_size:
        second = token_mean(needed(fit, "exact_gate").x, lambda x: ffn.up(x).square())
        weight = weight * second.sqrt().to(weight)
    return ExactScore(ffn, ("gate",), weight)


@predictor("exact_up", source="COUNTDOWN (arXiv:2505.17701)")
def exact_up(ffn: FFN, fit: FitTokens | None, *, gate_size: bool = True, norm: bool = True) -> Predictor:
    """|u_i| from the exact up projection, times the usual size of the activated gate.

    With neither factor it is the score of M-COUNTDOWN.

    Args:
        ffn: a gated FFN.
        fit: tokens; needed for ``gate_size``.
        gate_size: multiply by E|act(g_i)|.
        norm: multiply by ||W_down[:, i]||.

    Raises:
        UsageError: an FFN without a gate, or no tokens.
    """
    check_gated(ffn, "exact_up")
    weight = ffn.down_norms if norm else ffn.down_norms.new_ones(ffn.d_ff)
    if gate_size:
        mean = token_mean(needed(fit, "exact_up").x, lambda x: ffn.activated(x).abs())
        weight = weight * mean.to(weight)
    return ExactScore(ffn, ("up",), weight)
