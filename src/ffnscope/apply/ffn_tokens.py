"""Inputs of one FFN and what it is wanted to put out, token by token: what it can be trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ffnscope.types import FFNSite, FFNWeights

Activation = Callable[[Tensor], Tensor]
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
        for part in torch.arange(self.n, device=self.x.device).split(PIECE):
            x = _wide(self.x[part])
            self.wanted[part] += (channels(x, whole, activation) @ whole.down.T).to(self.wanted)

    def pieces(self, *, held_out: bool, size: int = PIECE) -> Iterator[tuple[Tensor, Tensor]]:
        """x and the wanted output, each [size, d_model] in at least float32, of the tokens to fit or those held out."""
        assert self.x is not None and self.wanted is not None, "there are tokens"
        first, last = (self.n_fit, self.n) if held_out else (0, self.n_fit)
        for start in range(first, last, size):
            part = slice(start, min(start + size, last))
            yield _wide(self.x[part]), _wide(self.wanted[part])

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """x and the wanted output of some tokens, in at least float32."""
        assert self.x is not None and self.wanted is not None, "there are tokens"
        index = index.to(self.x.device)
        return _wide(self.x[index]), _wide(self.wanted[index])


def token_bytes(model: nn.Module, sites: Sequence[FFNSite], n_tokens: int) -> int:
    """Bytes of the tokens of one of some FFNs, at most."""
    return 2 * n_tokens * max(site.d_model for site in sites) * next(iter(model.parameters())).element_size()


def channels(x: Tensor, weights: FFNWeights, activation: Activation) -> Tensor:
    """h [n, k] of inputs x [n, d_model]: act(up x), or act(gate x) * (up x) where there is a gate."""
    up = linear(x, weights.up, weights.up_bias)
    if weights.gate is None:
        return activation(up)
    return activation(linear(x, weights.gate, weights.gate_bias)) * up


def widened(weights: FFNWeights) -> FFNWeights:
    """The same in float32, or in float64 where they are that."""
    return mapped(weights, _wide)


def mapped(weights: FFNWeights, change: Activation) -> FFNWeights:
    """Every tensor of the weights changed."""
    present = {name: value for name in FIELDS if (value := getattr(weights, name)) is not None}
    return replace(weights, **{name: change(value) for name, value in present.items()})


FIELDS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()
