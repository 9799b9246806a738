"""Gate and up in a few bits: what they would compute is the score."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ffnscope.errors import UsageError
from ffnscope.ffn.function import FFN, wide
from ffnscope.registry import predictor
from ffnscope.sparse.ffn import check_input
from ffnscope.sparse.predictors.interface import FitTokens, Predictor
from ffnscope.sparse.predictors.packing import pack, unpack


class LowBitMatrix(nn.Module):
    """A matrix [d_ff, d_model] in groups of consecutive inputs: codes, and the step and lowest value of each group."""

    codes: Tensor
    step: Tensor
    low: Tensor

    def __init__(self, weight: Tensor, bits: int, group: int):
        super().__init__()
        self.shape, self.bits, self.group, self.dtype = weight.shape, bits, group, weight.dtype
        groups = nn.functional.pad(wide(weight), (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
        padded = groups.shape[1] * group - weight.shape[1]
        if padded:  # zeros that are no weights must not widen the range
            groups[:, -1, group - padded :] = groups[:, -1, :1]
        low, high = (groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True))
        low, step = low.half(), ((high - low) / (2**bits - 1)).half()
        spread = wide(step).where(step > 0, 1.0)
        codes = ((groups - wide(low)) / spread).round().clamp(0, 2**bits - 1).to(torch.uint8)
        self.register_buffer("codes", pack(codes, bits))
        self.register_buffer("step", step)
        self.register_buffer("low", low)
        self._dense: Tensor | None = None

    @property
    def dense(self) -> Tensor:
        """The matrix that the codes stand for, [d_ff, d_model]; made once, in the dtype of the FFN's weights."""
        if self._dense is None:
            codes = unpack(self.codes, self.bits, self.step.numel() * self.group).view(*self.step.shape[:2], self.group)
            whole = codes.float() * self.step.float() + self.low.float()
            self._dense = whole.flatten(1)[:, : self.shape[1]].to(self.dtype)
        return self._dense

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._dense = None


class LowBit(Predictor):
    """|act(g') u'| ||W_down|| with g' and u' of the matrices in a few bits."""

    norms: Tensor

    def __init__(self, ffn: FFN, bits: int, group: int):
        super().__init__(ffn)
        self.gate = None if ffn.weights.gate is None else LowBitMatrix(ffn.weights.gate, bits, group)
        self.up = LowBitMatrix(ffn.weights.up, bits, group)
        self.register_buffer("norms", ffn.down_norms)

    def forward(self, x: Tensor) -> Tensor:
        """[T, d_model] -> scores [T, d_ff]."""
        check_input(self.ffn, x)
        weights = self.ffn.weights
        up = _product(x, self.up.dense, weights.up_bias)
        if self.gate is None:
            return self.ffn.act(up).abs() * self.norms
        return (self.ffn.act(_product(x, self.gate.dense, weights.gate_bias)) * up).abs() * self.norms


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return wide(nn.functional.linear(x.to(weight), weight, bias))


@predictor("low_bit", source="own; quantised proxies also in Prox (arXiv:2607.27591)")
def low_bit(ffn: FFN, fit: FitTokens | None = None, *, bits: int = 4, group: int = 32) -> Predictor:
    """The contributions that gate and up would give if they had a few bits per weight.

    Weights are rounded to 2^bits equal steps between the lowest and highest of each group of inputs, with step and
    lowest value in float16. `bytes_read` is that of the packed codes; what computes here is a dense copy of them.

    Args:
        ffn: the FFN.
        fit: not used.
        bits: 2 to 8 per weight.
        group: inputs per group.

    Raises:
        UsageError: impossible bits or group.
    """
    if not 2 <= bits <= 8 or group < 2:
        raise UsageError(f"bits must be in [2, 8] and group at least 2; got {bits} and {group}.")
    return LowBit(ffn, bits, group)
