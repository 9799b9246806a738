"""What a predictor is, and the tokens that one is made from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ffnscope.errors import UsageError
from ffnscope.ffn.function import FFN
from ffnscope.sparse.products import Products

CHUNK = 1024
"""Tokens at a time where sums over fitting tokens are made."""
OnEpoch = Callable[[int, int, float], None]
"""Called after each epoch with epochs done, epochs at most, and the missed mass on the tokens to judge by."""


@dataclass(frozen=True, slots=True, eq=False)
class FitTokens:
    """Tokens to make a predictor from.

    Attributes:
        x: inputs of the FFN [T, d_model].
        document: document of each token [T], so that tokens to judge by are of other documents; or None.
        earlier: inputs of the FFN of the layer before at the same tokens [T, d_model], for a predictor that looks
            ahead; or None.
        window: window of each token [T], for a predictor that takes its scores from the beginning of each; or None.
        density: share of the channels that will be kept, for a predictor that is trained to tell these from the
            others; None where that is not known.
        checkpoint: file that a predictor which is trained goes on from when it was cut off; or None.
        on_epoch: called after each epoch of such a training.
    """

    x: Tensor
    document: Tensor | None = None
    earlier: Tensor | None = None
    window: Tensor | None = None
    density: float | None = None
    checkpoint: Path | None = None
    on_epoch: OnEpoch | None = None

    def __post_init__(self) -> None:
        if self.x.dim() != 2 or not len(self.x):
            raise UsageError(f"tokens to fit must be [T, d_model] with T at least 1; got {tuple(self.x.shape)}.")
        for name in ("document", "earlier", "window"):
            value: Tensor | None = getattr(self, name)
            if value is not None and len(value) != len(self.x):
                raise UsageError(f"{name} has {len(value)} rows for {len(self.x)} tokens.")


class Predictor(nn.Module):
    """Estimates c_i = |h_i| ||W_down[:, i]||_2 for every channel, or something of its order.

    ``forward(x [T, d_model]) -> scores [T, d_ff]``: finite, not negative, high = keep, of each token alone. Its
    `state_dict` is all that a file needs beside the weights of the FFN.

    Attributes:
        ffn: the FFN that it is about.
        reads: which matrices of the FFN, of "gate" and "up", it has read in full; with `score_and_read` they need no
            second read for the channels that are kept.
        lookahead: 0 where ``forward`` is given the input of the FFN, 1 where it is that of the FFN one layer before.
    """

    lookahead: int = 0

    def __init__(self, ffn: FFN, reads: Collection[str] = ()):
        super().__init__()
        self.ffn = ffn
        self.reads = frozenset(reads)

    def score_and_read(self, x: Tensor) -> tuple[Tensor, Products]:
        """[T, d_model] -> scores [T, d_ff], and the products with the matrices of ``reads``, which it has made."""
        return self(x), Products()

    @property
    def bytes_read(self) -> int:
        """Bytes that it reads per token in the dtypes that it has: what it stores, and the matrices of ``reads``.

        Cards and comparisons tell `ffnscope.sparse.costs.predictor_bytes` instead, which is the same in every dtype.
        """
        own = sum(value.numel() * value.element_size() for value in self.state_dict().values())
        return own + sum(self.ffn.matrix_bytes(name) for name in self.reads)


class Prompted(Predictor):
    """A predictor whose scores are those of a prompt, for all that follows it.

    Attributes:
        prompt: tokens at the beginning of a window that are its prompt where a text is measured; 0: the scores are
            those of the fitting tokens until another prompt is given.
    """

    prompt: int = 0

    def begin(self, x: Tensor) -> None:
        """Take the scores of a prompt, x [T, d_model]."""
        raise NotImplementedError


def needed(fit: FitTokens | None, name: str) -> FitTokens:
    """The tokens to fit; raises UsageError where there are none."""
    if fit is None:
        raise UsageError(f"predictor {name!r} is made from calibration tokens; give FitTokens.")
    return fit


def by_name(value: int | Mapping[str, int], ffn: FFN, what: str) -> int:
    """A number for one FFN: the one that is given, or that under its name, or under "*" for all others.

    Raises:
        UsageError: a mapping without this FFN, or something else than a whole number.
    """
    found: object = value
    if isinstance(value, Mapping):
        found = value.get(ffn.name, value.get("*"))
        if found is None:
            raise UsageError(f'{what} names no number for {ffn.name}; give it by that name, or for all others by "*".')
    if not isinstance(found, int) or isinstance(found, bool):
        raise UsageError(f"{what} of {ffn.name} must be a whole number; got {found!r}.")
    return found


def check_gated(ffn: FFN, name: str) -> None:
    """Raise UsageError for an FFN without a gate."""
    if not ffn.gated:
        raise UsageError(
            f"predictor {name!r} is for gated FFNs; {ffn.name} has no gate, so its up projection is all there is to "
            "predict. Use low_bit or whitened_svd."
        )


def token_mean(x: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean over tokens of ``of(x [n, d_model]) -> [n, ...]``, in float64."""
    return sum((of(part).double().sum(0) for part in _chunks(x)), torch.zeros((), dtype=torch.float64)) / len(x)


def _chunks(x: Tensor) -> Iterator[Tensor]:
    yield from x.split(CHUNK)
