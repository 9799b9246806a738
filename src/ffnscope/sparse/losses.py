"""The loss of a model whose FFNs compute under the masks of selectors, paired with that of the dense model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Mapping

import torch
from torch import Tensor, nn

from ffnscope.calibrate.windows import Windows
from ffnscope.evaluate.perplexity import check_targets, token_nll, window_ratio
from ffnscope.sparse.card import LossChange
from ffnscope.sparse.runtime import Runtime
from ffnscope.sparse.uses import Selector, Step
from ffnscope.types import FFNSite


@contextlib.contextmanager
def selecting(model: nn.Module, selectors: Mapping[FFNSite, Selector]) -> Generator[nn.Module]:
    """Within the block FFNs run dense under the masks of selectors, for every token: to measure what they cost.

    An empty mapping leaves the model dense. Unlike `wrap_` nothing is tried out, copied or warned about.
    """
    runtime = Runtime(model, selectors, 0.0, Step(prefill=True))
    try:
        for site in selectors:
            runtime.put(site, "masked")
        yield model
    finally:
        runtime.close()


def window_losses(
    model: nn.Module, selectors: Mapping[FFNSite, Selector], windows: Windows, batch_size: int = 4
) -> Tensor:
    """Summed NLL of every window [n], nats, float64.

    Raises:
        UsageError: nothing to predict.
        NonFiniteError: a loss is NaN or infinite.
    """
    check_targets(windows)
    with selecting(model, selectors):
        parts = [
            token_nll(model, batch, first=i * batch_size)[0] for i, batch in enumerate(windows.batches(batch_size))
        ]
    return torch.cat(parts)


def document_sums(values: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Sums of a number per window [n] over the windows of each document, and targets of each document, ascending."""
    documents, place = windows.document.unique(return_inverse=True)
    zeros = torch.zeros(len(documents), dtype=torch.float64)
    counts = windows.targets.sum(1).cpu().double()
    return zeros.index_add(0, place, values.double().cpu()), zeros.index_add(0, place, counts)


def loss_change(dense: Tensor, sparse: Tensor, windows: Windows) -> LossChange:
    """What selections do to the loss, from the NLL sums [n] of all windows without and with them."""
    sums, counts = document_sums(sparse - dense, windows)
    value, stderr = window_ratio(sums, counts)
    n = windows.n_targets
    before, after = (math.exp(float(nll.sum()) / n) for nll in (dense, sparse))
    return LossChange(before, after, value, stderr, int((counts > 0).sum()), n)
