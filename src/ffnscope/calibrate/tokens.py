"""What calibration asks of a tokenizer, and rows of tokens."""

from __future__ import annotations

from collections.abc import Iterator
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
    """Tokens of one future window: ids [t] int64, targets [t] bool, and the index of the document it starts in."""

    ids: Tensor
    targets: Tensor
    document: int


def row_of(ids: list[int], document: int, targets: list[bool] | None = None) -> Row:
    """Make a row; without ``targets`` every token but the first is one. The first never is."""
    mask = torch.ones(len(ids), dtype=torch.bool) if targets is None else torch.tensor(targets, dtype=torch.bool)
    mask[:1] = False
    return Row(torch.tensor(ids, dtype=torch.int64), mask, document)


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
