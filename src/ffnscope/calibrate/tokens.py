"""What calibration asks of a tokenizer, and rows of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

PIECE = 2**20
"""Characters that are tokenised at once; a longer text is cut after a line, so that the work can stop early."""


class Tokenizer(Protocol):
    """The calls of a transformers tokenizer that are used; ``bos_token_id`` and its like are read where they exist."""

    def __call__(self, text: str, /, *, add_special_tokens: bool, verbose: bool) -> Any:
        """Return a mapping with ``input_ids``."""
        ...

    def get_chat_template(self) -> str:
        """Return the Jinja template; ValueError when there is none."""
        ...

    def apply_chat_template(self, conversation: Any, /, **kwargs: Any) -> Any:
        """Return a mapping with ``input_ids`` and, if asked, ``assistant_masks``."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """Tokens of one future window, of which a long text has many more than are chosen: no tensors yet.

    Attributes:
        ids: of the tokens.
        document: index of the document it starts in.
        answers: whether each token is one that is to be predicted; None = all are. The first never counts.
    """

    ids: Sequence[int]
    document: int
    answers: Sequence[bool] | None = None

    @property
    def predicts(self) -> bool:
        """Whether the prediction of any token counts."""
        return len(self.ids) > 1 if self.answers is None else any(self.answers[1:])

    @property
    def targets(self) -> Tensor:
        """Whose prediction counts, [t] bool."""
        given = [True] * len(self.ids) if self.answers is None else self.answers
        return torch.tensor([False, *given[1:]], dtype=torch.bool)


def encode(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer adds by default only if ``special``."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def special_id(tokenizer: Tokenizer, name: str) -> int | None:
    """Id of a special token (``bos``, ``eos``, ``pad``), or None where the tokenizer has none."""
    return getattr(tokenizer, f"{name}_token_id", None)


def leading_bos(tokenizer: Tokenizer) -> list[int]:
    """``[bos id]`` if the tokenizer puts one before a text by default, else ``[]``."""
    bos = special_id(tokenizer, "bos")
    added = encode(tokenizer, "a", special=True)
    adds = bos is not None and added[:1] == [bos] and encode(tokenizer, "a")[:1] != [bos]
    return [bos] if bos is not None and adds else []


def pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of at most `PIECE` characters: after a line if there is one, else before a space."""
    start = 0
    while len(text) - start > PIECE:
        stop = start + PIECE
        end = text.rfind("\n", start, stop) + 1
        if not end:
            end = text.rfind(" ", start + 1, stop)
        end = end if end > start else stop
        yield text[start:end]
        start = end
    yield text[start:]
