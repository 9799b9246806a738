"""What a predictor is given for some tokens: their own inputs, those of the FFN before, or what follows a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.sparse.predictors.interface import FitTokens, Predictor, Prompted


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """Tokens that are read one after the other.

    Attributes:
        x: inputs of the FFN [T, d_model], from which the truth about the tokens follows.
        seen: what the predictor is given for them [T, d_model]; ``x``, unless it looks ahead.
        prompt: inputs [n, d_model] of the tokens before them, for a predictor that takes its scores from these.
    """

    x: Tensor
    seen: Tensor
    prompt: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Readings:
    """All tokens of one FFN that a selection is for.

    Attributes:
        parts: in the order of the text; one, or one per window where each has a prompt of its own.
        document: document of each token in all parts together [T].
    """

    parts: Sequence[Reading]
    document: Tensor

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.document)

    def chunks(self, predictor: Predictor, chunk: int = 1024) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield x and seen, ``chunk`` tokens at a time, with the predictor at the prompt before them."""
        for part in self.parts:
            if part.prompt is not None and isinstance(predictor, Prompted):
                predictor.begin(part.prompt)
            yield from zip(part.x.split(chunk), part.seen.split(chunk), strict=True)


def readings_of(predictor: Predictor, tokens: FitTokens) -> Readings:
    """The tokens as a predictor is given them.

    Raises:
        UsageError: a predictor that looks ahead, or takes its scores from prompts, and tokens without what it reads.
    """
    document = torch.zeros(len(tokens.x), dtype=torch.int64) if tokens.document is None else tokens.document
    if isinstance(predictor, Prompted) and predictor.prompt:
        return _after_prompts(predictor, tokens, document)
    if not predictor.lookahead:
        return Readings([Reading(tokens.x, tokens.x)], document)
    if tokens.earlier is None:
        raise UsageError(
            f"the predictor of {predictor.ffn.name} reads the input of the FFN one layer before, which these tokens "
            "lack. Give FitTokens.earlier (Traces.fit_tokens with lookahead=1)."
        )
    return Readings([Reading(tokens.x, tokens.earlier)], document)


def _after_prompts(predictor: Prompted, tokens: FitTokens, document: Tensor) -> Readings:
    if tokens.window is None:
        raise UsageError(
            f"the predictor of {predictor.ffn.name} takes its scores from the first tokens of each window, and these "
            "tokens do not say which window they are of. Give FitTokens.window."
        )
    parts: list[Reading] = []
    kept: list[Tensor] = []
    for window in tokens.window.unique().tolist():
        rows = (tokens.window == window).nonzero().flatten()
        prompt, rest = rows[: predictor.prompt], rows[predictor.prompt :]
        if len(rest):
            parts.append(Reading(tokens.x[rest], tokens.x[rest], tokens.x[prompt]))
            kept.append(rest)
    if not parts:
        raise UsageError(
            f"no window has a token after a prompt of {predictor.prompt} tokens. Give longer windows (--max-length), "
            "or a shorter prompt (--predictor-param prompt=N)."
        )
    return Readings(parts, document[torch.cat(kept)])
