"""How much memory a calibration pass takes beyond a bare forward (and backward) of the same batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from ffnscope.calibrate.sums import Surroundings, following
from ffnscope.registry import STATISTICS
from ffnscope.rules import GRADIENTS, MARKS, NEXT, Statistic
from ffnscope.types import FFNSite


def statistics_bytes(
    sites: Sequence[FFNSite], statistics: Iterable[str], core_size: int | None = 0, n_documents: int = 0
) -> int:
    """Memory of the sums of a pass, in bytes: 8 per value, 4 per count.

    ``core_size`` is the number of core channels per site, for statistics that have it in their shape; None = all
    channels, as a single pass takes them before the core is known. ``n_documents`` is the number of groups of
    documents, for statistics by document. Where only some layers are among ``sites``, what is about an FFN and the next
    is counted for each of them.
    """
    known = [STATISTICS.get(name) for name in statistics]
    around = Surroundings(following(sites), n_documents)
    return sum(_bytes(around, site, one, core_size) for one in known for site in sites if around.takes(site, one))


def pass_bytes(
    sites: Sequence[FFNSite],
    statistics: Iterable[str],
    n_tokens: int,
    dtype: torch.dtype,
    core_size: int | None = 0,
    *,
    experts_per_token: int = 1,
) -> int:
    """Peak memory of a pass beyond a bare forward (and backward) of the same batches, in bytes.

    It is that of the sums, and of the signals of one batch that wait for the backward: h of every FFN but the first,
    which starts the autograd graph anyway, and x or y where a statistic reads them together with a gradient.
    Temporaries are those of one FFN; they come and go where the bare pass has its own, and are not counted.

    Args:
        sites: FFNs that are observed, in the order of the model.
        statistics: names of what the pass collects; see `required_statistics`.
        n_tokens: tokens of the largest batch that runs backward, padding included.
        dtype: of the model's activations.
        core_size: see `statistics_bytes`.
        experts_per_token: how many experts of a layer each token is routed to.
    """
    names = list(statistics)
    backward = [STATISTICS.get(name) for name in names if STATISTICS.get(name).needs_gradient]
    waiting = {read for one in backward for read in one.reads} - {*GRADIENTS, *NEXT, *MARKS, "h"}
    layers: dict[str, list[FFNSite]] = {}  # the experts of a layer share its tokens
    for site in sites:
        layers.setdefault(site.group, []).append(site)
    held = 0
    for i, (first, *others) in enumerate(layers.values()):
        uses = first.n_uses
        width = len(waiting) * first.d_model
        if backward and not _keeps_activation(first):
            width += first.d_ff * (uses if i > 0 else uses - 1)
        held += width * min(experts_per_token, 1 + len(others))
    return statistics_bytes(sites, names, core_size) + n_tokens * held * dtype.itemsize


def _keeps_activation(site: FFNSite) -> bool:
    """Whether autograd keeps h of this site by itself: the derivative of ReLU is read off its output."""
    return site.gate is None and site.activation == "relu"


def _bytes(around: Surroundings, site: FFNSite, statistic: Statistic, core_size: int | None) -> int:
    shape = around.sizes(statistic, site, site.d_ff if core_size is None else min(core_size, site.d_ff))
    return math.prod(shape) * statistic.itemsize
