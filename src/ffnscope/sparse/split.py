"""Split of documents into those that fit, those that calibrate and those that test."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ffnscope.errors import UsageError

Part = Literal["fit", "calibrate", "test"]
PARTS: tuple[Part, ...] = ("fit", "calibrate", "test")
SHARES = (0.6, 0.2, 0.2)


def split_documents(document: Tensor, seed: int = 0) -> dict[Part, Tensor]:
    """Split the documents of some tokens 60/20/20; every part has at least one, and no document is in two.

    Tokens of one document depend on each other, so a split by token would let a calibration see what it is tested on.

    Args:
        document: document of each token [T], whole numbers.
        seed: chooses; the parts depend on it and on the documents' numbers alone, on every platform.

    Returns:
        Part -> its documents, ascending.

    Raises:
        UsageError: fewer than three documents.
    """
    known = hash_order(document.unique().tolist(), seed)
    if len(known) < len(PARTS):
        raise UsageError(
            f"a split into fit, calibrate and test needs at least 3 documents; the traces have {len(known)}. Trace a "
            "text of more documents, with windows that each begin in another one."
        )
    n_calibrate, n_test = (max(1, round(share * len(known))) for share in SHARES[1:])
    n_fit = len(known) - n_calibrate - n_test
    parts = (known[:n_fit], known[n_fit : n_fit + n_calibrate], known[n_fit + n_calibrate :])
    return {name: torch.tensor(sorted(part)) for name, part in zip(PARTS, parts, strict=True)}


def hash_order(documents: Sequence[int], seed: int) -> list[int]:
    """The documents by their hash with a seed."""

    def rank(document: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{document}".encode(), digest_size=16).digest()

    return sorted(documents, key=rank)
