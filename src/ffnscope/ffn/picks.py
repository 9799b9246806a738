"""Which tokens some rows are: read off the index that picked them from the tokens, by the memory that they lie in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor


class Picks:
    """Rows that were picked by an index from tensors of one row per token, while one module runs.

    ``n_tokens`` is batch * T. Rows stay in memory as long as this object, so no other tensor can lie where they do.
    """

    def __init__(self, n_tokens: int):
        self.n_tokens = n_tokens
        self._picked: list[tuple[Tensor, Tensor]] = []

    def note(self, args: Sequence[Any], kwargs: Mapping[str, Any], rows: Any) -> None:
        """Remember the rows that ``__getitem__`` or ``index_select`` gave, if its source has one row per token."""
        source = args[0] if args else kwargs.get("input")
        index = kwargs.get("index", args[-1] if args else None)
        if isinstance(index, tuple):  # hidden[None, index]
            parts = cast("tuple[Any, ...]", index)
            index = parts[1] if len(parts) == 2 and parts[0] is None else None
        if isinstance(index, list):
            index = torch.tensor(index)
        if not isinstance(index, Tensor) or not isinstance(source, Tensor) or not source.is_floating_point():
            return
        is_mask = index.dtype == torch.bool
        if index.dim() != (source.dim() - 1 if is_mask else 1) or (not is_mask and source.dim() != 2):
            return
        if rows.shape[-1] != source.shape[-1]:  # columns were picked
            return
        tokens = index.flatten().nonzero().flatten() if is_mask else index
        before = self._picked_before(source)
        if before is not None:
            self._picked.append((rows, before[tokens.to(before.device)]))
        elif source.shape[:-1].numel() == self.n_tokens:
            self._picked.append((rows, tokens))

    def tokens(self, x: Tensor) -> Tensor | None:
        """Tokens of the rows of x [n, width], a piece of what was picked perhaps; None when they cannot be told."""
        if x.shape[0] == 0:
            return torch.empty(0, dtype=torch.int64, device=x.device)
        return self._picked_before(x)

    def _picked_before(self, x: Tensor) -> Tensor | None:
        for rows, index in reversed(self._picked):
            offset = x.data_ptr() - rows.data_ptr()
            if 0 <= offset < rows.numel() * rows.itemsize:
                start = offset // (rows.stride(-2) * rows.itemsize)
                return index[start : start + x.shape[:-1].numel()]
        return None
