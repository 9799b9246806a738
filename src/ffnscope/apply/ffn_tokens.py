"""Inputs of one FFN and what it is wanted to put out, token by token: what it can be trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ffnscope.ffn.function import FFN, Activation, wide
from ffnscope.types import FFNSite, FFNWeights

PIECE = 2048
"""Tokens at a time where no gradient is needed."""


@dataclass(slots=True, eq=False)
class FFNTokens:
    """Tokens of one FFN, in the dtype of the model; those to fit come first, held-out ones after them.

    Memory: 2 ``capacity`` d_model numbers.

    Attributes:
        capacity: how many tokens will come.
        n_fit: how many there are to fit.
        n: how many there are.
        x: inputs of the FFN [capacity, d_model]; None before the first.
        wanted: what is wanted beyond the FFN's own output; after `aim` the wanted output, without the bias of down.
    """

    capacity: int
    n_fit: int = 0
    n: int = 0
    x: Tensor | None = None
    wanted: Tensor | None = None

    def add(self, x: Tensor, shift: Tensor | None, *, held_out: bool) -> None:
        """Add x [n, d_model], and what is wanted beyond the FFN's own output [n, d_model]; None for nothing."""
        assert held_out or self.n == self.n_fit, "tokens to fit come first"
        if self.x is None or self.wanted is None:
            self.x = x.new_empty(self.capacity, x.shape[1])
            self.wanted = torch.zeros_like(self.x)
        end = self.n + len(x)
        self.x[self.n : end] = x
        if shift is not None:
            self.wanted[self.n : end] = shift.to(self.wanted)
        self.n = end
        self.n_fit += 0 if held_out else len(x)

    def aim(self, weights: FFNWeights, activation: Activation) -> None:
        """Add the output of the dense FFN to what is wanted beyond it."""
        assert self.x is not None and self.wanted is not None, "there are tokens"
        whole = widened(weights)
        function = FFN(whole, activation)
        for part in torch.arange(self.n, device=self.x.device).split(PIECE):
            x = wide(self.x[part])
            self.wanted[part] += (function.h(x) @ whole.down.T).to(self.wanted)

    def pieces(self, *, held_out: bool, size: int = PIECE) -> Iterator[tuple[Tensor, Tensor]]:
        """x and the wanted output, each [size, d_model] in at least float32, of the tokens to fit or those held out."""
        assert self.x is not None and self.wanted is not None, "there are tokens"
        first, last = (self.n_fit, self.n) if held_out else (0, self.n_fit)
        for start in range(first, last, size):
            part = slice(start, min(start + size, last))
            yield wide(self.x[part]), wide(self.wanted[part])

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """x and the wanted output of some tokens, in at least float32."""
        assert self.x is not None and self.wanted is not None, "there are tokens"
        index = index.to(self.x.device)
        return wide(self.x[index]), wide(self.wanted[index])


def token_bytes(model: nn.Module, sites: Sequence[FFNSite], n_tokens: int) -> int:
    """Bytes of the tokens of one of some FFNs, at most."""
    return 2 * n_tokens * max(site.d_model for site in sites) * next(iter(model.parameters())).element_size()


def widened(weights: FFNWeights) -> FFNWeights:
    """The same in float32, or in float64 where they are that."""
    return mapped(weights, wide)


def mapped(weights: FFNWeights, change: Activation) -> FFNWeights:
    """Every tensor of the weights changed."""
    present = {name: value for name in FIELDS if (value := getattr(weights, name)) is not None}
    return replace(weights, **{name: change(value) for name, value in present.items()})


FIELDS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
