"""Token windows: the one form in which text reaches a model, in calibration and in evaluation alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.io import hash_tensors


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Equal-length rows of tokens.

    Attributes:
        input_ids: [n, T] int64.
        valid: [n, T] bool, False = padding (never counted); always right-padded. All True in contiguous mode.
        targets: [n, T] bool, True = the prediction of this token counts in the loss. Column 0 is never True.
        document: [n] int64, index of the document that a window starts in.
        source: where the text came from, in words.
    """

    input_ids: Tensor
    valid: Tensor
    targets: Tensor
    document: Tensor
    source: str

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        if len(shape) != 2 or self.valid.shape != shape or self.targets.shape != shape:
            raise UsageError("windows: input_ids, valid and targets must share one shape [n, T].")
        if bool((self.targets & ~self.valid).any()) or bool(self.targets[:, 0].any()):
            raise UsageError("windows: a target must be a valid token and cannot be the first of its window.")

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens per window, T, padding included."""
        return self.input_ids.shape[1]

    @property
    def n_tokens(self) -> int:
        """Valid tokens."""
        return int(self.valid.sum())

    @property
    def n_targets(self) -> int:
        """Tokens whose prediction counts in the loss."""
        return int(self.targets.sum())

    @property
    def hash(self) -> str:
        """Hash of the token ids and masks: equal hash, equal text."""
        return hash_tensors([("ids", self.input_ids), ("valid", self.valid), ("targets", self.targets)])

    def __getitem__(self, rows: slice | Tensor) -> Windows:
        return Windows(self.input_ids[rows], self.valid[rows], self.targets[rows], self.document[rows], self.source)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle these rows alone, not all that they are a view of."""
        tensors = (self.input_ids, self.valid, self.targets, self.document)
        return Windows, (*(one.clone() for one in tensors), self.source)

    def cut(self, length: int) -> Windows:
        """Return the same windows, cut to at most ``length`` tokens."""
        if length < 2:
            raise UsageError(f"windows of {length} token(s) predict nothing; max_length must be at least 2.")
        ids, valid, targets = (t[:, :length] for t in (self.input_ids, self.valid, self.targets))
        return Windows(ids, valid, targets, self.document, self.source)

    def batches(self, size: int) -> Iterator[Windows]:
        """Yield consecutive batches of at most ``size`` windows, right padding trimmed to the longest row."""
        if size < 1:
            raise UsageError(f"batch size must be at least 1; got {size}.")
        for start in range(0, len(self), size):
            batch = self[slice(start, start + size)]
            longest = int(batch.valid.sum(1).max())
            yield batch if longest == self.length else batch.cut(max(longest, 2))


def contiguous_windows(ids: Tensor, source: str, document: Tensor | None = None) -> Windows:
    """Make windows without padding from token ids [n, T]: every token but the first of a row is a target."""
    targets = torch.ones_like(ids, dtype=torch.bool)
    targets[:, 0] = False
    if document is None:
        document = torch.arange(ids.shape[0])
    return Windows(ids, torch.ones_like(targets), targets, document, source)


def joined(parts: Sequence[Windows], source: str) -> Windows:
    """Windows of several texts, one text after the other, as those of one; shorter ones are padded to the longest.

    Documents are numbered on from text to text.
    """
    length = max(one.length for one in parts)
    longer = [[_padded(t, length) for t in (one.input_ids, one.valid, one.targets)] for one in parts]
    documents: list[Tensor] = []
    for one in parts:
        first = int(documents[-1].max()) + 1 if documents else 0
        documents.append(one.document + first)
    ids, valid, targets = (torch.cat(rows) for rows in zip(*longer, strict=True))
    return Windows(ids, valid, targets, torch.cat(documents), source)


def _padded(rows: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, length - rows.shape[1]))
