"""Low-rank gate and up that are nearest to the true ones on calibration inputs; nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ffnscope.errors import UsageError
from ffnscope.ffn.function import FFN, wide
from ffnscope.registry import predictor
from ffnscope.sparse.ffn import check_input
from ffnscope.sparse.predictors.interface import FitTokens, Predictor, by_name, needed, token_mean


class LowRankMatrix(nn.Module):
    """A matrix [d_ff, d_model] as ``outer`` [d_ff, rank] times ``inner`` [rank, d_model]."""

    outer: Tensor
    inner: Tensor

    def __init__(self, outer: Tensor, inner: Tensor):
        super().__init__()
        self.register_buffer("outer", outer)
        self.register_buffer("inner", inner)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[T, d_model] -> [T, d_ff]."""
        return wide(nn.functional.linear(x.to(self.inner) @ self.inner.T, self.outer, bias))


class WhitenedSVD(Predictor):
    """|act(g') u'| ||W_down||, g' and u' of low rank; u' may be a constant size instead."""

    weight: Tensor

    def __init__(self, ffn: FFN, gate: LowRankMatrix, up: LowRankMatrix | None, weight: Tensor):
        super().__init__(ffn)
        self.gate, self.up = gate, up
        self.register_buffer("weight", wide(weight))

    def forward(self, x: Tensor) -> Tensor:
        """[T, d_model] -> scores [T, d_ff]."""
        check_input(self.ffn, x)
        score = self.ffn.act(self.gate(x, self.ffn.activated_weight[1]))
        if self.up is not None:
            score = score * self.up(x, self.ffn.weights.up_bias)
        return score.abs() * self.weight


@predictor("whitened_svd", source="own form of SVDP (arXiv:2603.14110)")
def whitened_svd(
    ffn: FFN, fit: FitTokens | None, *, rank: int | Mapping[str, int] = 128, up: bool = True, damping: float = 1e-4
) -> Predictor:
    """Contributions from gate and up of a low rank, the one with the least squared error on calibration inputs.

    With G = X^T X / T + damping * mean(diag) I = L L^T, the truncated SVD of W L times L^-1 is that matrix. SVDP has
    the gate alone and no damping.

    Args:
        ffn: the FFN; without a gate it is up that is predicted.
        fit: tokens.
        rank: of each matrix, at most min(d_model, d_ff); or FFN -> rank, with "*" for all others.
        up: predict up too; else its usual size sqrt(E[u_i^2]) takes its place.
        damping: share of the mean square of an input that is added to all; positive.

    Raises:
        UsageError: no tokens, or an impossible rank or damping.
    """
    tokens, rank = needed(fit, "whitened_svd"), by_name(rank, ffn, "rank")
    if not 1 <= rank <= min(ffn.d_model, ffn.d_ff):
        raise UsageError(f"rank must be in [1, {min(ffn.d_model, ffn.d_ff)}] for {ffn.name}; got {rank}.")
    if damping <= 0:
        raise UsageError(f"damping must be positive; got {damping:g}.")
    factor = whitening(tokens.x, ffn.weights.up.device, damping)
    gate = truncated(ffn.activated_weight[0], factor, rank)
    if not ffn.gated:
        return WhitenedSVD(ffn, gate, None, ffn.down_norms)
    if up:
        return WhitenedSVD(ffn, gate, truncated(ffn.weights.up, factor, rank), ffn.down_norms)
    size = token_mean(tokens.x, lambda x: ffn.up(x).square()).sqrt()
    return WhitenedSVD(ffn, gate, None, ffn.down_norms * size.to(ffn.down_norms))


def whitening(x: Tensor, device: torch.device, damping: float = 1e-4) -> Tensor:
    """L with L L^T = mean of x x^T over tokens x [T, n] + damping * mean(diagonal) I, [n, n] float64."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=device)
    for part in x.split(4096):
        rows = wide(part.to(device))
        total += rows.T @ rows
    moments = total / len(x)
    scale = damping * moments.diagonal().mean().clamp_min(1e-300)
    return torch.linalg.cholesky(moments + scale * torch.eye(len(moments), dtype=moments.dtype, device=device))


def truncated(weight: Tensor, factor: Tensor, rank: int) -> LowRankMatrix:
    """The matrix of a rank nearest to ``weight`` [out, in] where inputs have the second moments factor factor^T."""
    whitened = weight.double() @ factor
    if weight.shape[0] < weight.shape[1]:  # the smaller of the two products; no inverse of the factor
        outer = torch.linalg.eigh(whitened @ whitened.T).eigenvectors.flip(1)[:, :rank]
        return LowRankMatrix(outer.to(weight.dtype), (outer.T @ weight.double()).to(weight.dtype))
    vectors = torch.linalg.eigh(whitened.T @ whitened).eigenvectors.flip(1)[:, :rank]  # of the largest values first
    inner = torch.linalg.solve_triangular(factor, vectors.T.contiguous(), upper=False, left=False)
    return LowRankMatrix((whitened @ vectors).to(weight.dtype), inner.to(weight.dtype))
