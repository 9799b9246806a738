"""Signs alone: how many products of input and weight are positive."""

from __future__ import annotations

import torch
from torch import Tensor

from ffnscope.ffn.function import FFN
from ffnscope.registry import predictor
from ffnscope.sparse.ffn import check_input
from ffnscope.sparse.predictors.interface import FitTokens, Predictor
from ffnscope.sparse.predictors.packing import pack, unpack


class SignBit(Predictor):
    """Share of the products x_j W_ij that are positive, from one bit per weight."""

    signs: Tensor

    def __init__(self, ffn: FFN):
        super().__init__(ffn)
        weight, _ = ffn.activated_weight
        self.register_buffer("signs", pack((weight >= 0).to(torch.uint8), 1))
        self._wide: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[T, d_model] -> scores [T, d_ff] in [0, 1]."""
        check_input(self.ffn, x)
        if self._wide is None:
            bits = unpack(self.signs, 1, self.ffn.d_ff * self.ffn.d_model).view(self.ffn.d_ff, self.ffn.d_model)
            self._wide = bits.float() * 2 - 1
        agreement = torch.where(x.to(self._wide.device) >= 0, 1.0, -1.0) @ self._wide.T
        return (agreement / self.ffn.d_model + 1) / 2

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._wide = None


@predictor("sign_bit", source="SparseInfer (arXiv:2411.12692)")
def sign_bit(ffn: FFN, fit: FitTokens | None = None) -> Predictor:
    """The share of products of input and gate weight that are positive; made for ReLU models.

    The published rule skips a channel where N_negative > alpha N_positive. That is a score below 1 / (1 + alpha): 0.5
    for its alpha of 1.00. The bias of the gate is left out.

    Args:
        ffn: the FFN; without a gate it is the up projection that counts.
        fit: not used.
    """
    return SignBit(ffn)
