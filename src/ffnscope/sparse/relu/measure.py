"""Perplexity and exact zeros of a model, in one pass over a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.calibrate.rows import TokenRows
from ffnscope.calibrate.taps import channel_taps
from ffnscope.calibrate.windows import Windows
from ffnscope.evaluate.perplexity import check_targets, perplexity_result, token_nll
from ffnscope.types import EvalResult, FFNSite


@dataclass(frozen=True, slots=True)
class ZeroShares:
    """What `measure_zeros` found.

    Attributes:
        perplexity: on the text.
        zeros: site -> share of channel activations h that are exactly 0, over the tokens.
    """

    perplexity: EvalResult
    zeros: Mapping[FFNSite, float]

    @property
    def sparsity(self) -> float:
        """Share of zeros, every channel of the model counted once per token."""
        channels = sum(site.d_ff for site in self.zeros)
        return sum(share * site.d_ff for site, share in self.zeros.items()) / channels

    def row(self) -> dict[str, Any]:
        """As a row of a table."""
        return {
            "perplexity": self.perplexity.value,
            "perplexity_stderr": self.perplexity.stderr,
            "sparsity": self.sparsity,
            "sparsity_by_site": {site.name: share for site, share in self.zeros.items()},
        }


def measure_zeros(model: nn.Module, windows: Windows, sites: Sequence[FFNSite], *, batch_size: int = 4) -> ZeroShares:
    """Perplexity and the shares of exact zeros on windows; padding is not counted.

    A channel counts as zero for a token when down reads exactly 0 there: such a channel can be left out without any
    error. ProSparse's sparsity is the same number.

    Raises:
        UsageError: no token is a target.
        NonFiniteError: a loss is NaN or infinite.
        DeviceError: the accelerator is out of memory.
    """
    check_targets(windows)
    counts = dict.fromkeys(sites, 0)
    nll: list[Tensor] = []
    for batch in windows.batches(batch_size):
        rows = TokenRows(batch.valid)

        def count(site: FFNSite, h: Tensor, rows: TokenRows = rows) -> None:
            counts[site] += int((rows.take(site, h) == 0).sum())

        with channel_taps(model, sites, count):
            nll.append(token_nll(model, batch, first=sum(map(len, nll)))[0])
    shares = {site: n / (windows.n_tokens * site.d_ff) for site, n in counts.items()}
    return ZeroShares(perplexity_result(torch.cat(nll), windows), shares)
