"""What masks do to the loss, from summed losses per window, paired with those of the dense model."""

from __future__ import annotations

import math

from torch import Tensor

from ffnscope.calibrate.windows import Windows
from ffnscope.evaluate.intervals import sums_by_document
from ffnscope.evaluate.perplexity import window_ratio
from ffnscope.sparse.card import LossChange


def document_sums(values: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Sums of a number per window [n] over the windows of each document, and targets of each document, ascending."""
    return sums_by_document(values, windows.document, windows.document.unique(), windows.targets.sum(1))


def loss_change(dense: Tensor, sparse: Tensor, windows: Windows) -> LossChange:
    """What selections do to the loss, from the NLL sums [n] of all windows without and with them."""
    sums, counts = document_sums(sparse - dense, windows)
    value, stderr = window_ratio(sums, counts)
    n = windows.n_targets
    before, after = (math.exp(float(nll.sum()) / n) for nll in (dense, sparse))
    return LossChange(before, after, value, stderr, int((counts > 0).sum()), n)
