"""Which FFN comes after which, the norms that they read through, and the channels that null cores are drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ffnscope.calibrate.memory import statistics_bytes
from ffnscope.calibrate.sums import following
from ffnscope.errors import LayoutError, UsageError
from ffnscope.ffn.stream import find_stream
from ffnscope.ffn.survey import survey
from ffnscope.types import FFNSite

ALL = "all"
POOL = 10  # channels to draw from, per core channel
LEAST_POOL = 100
POOL_BYTES = 2**32


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """FFNs in the order of the model.

    Attributes:
        following: FFN -> that of the next layer, both among the analysed ones.
        norms: FFN -> weight [d_model] of the norm through which it reads the stream; those without one, or where it was
            not recognised, are missing.
        skipped: FFN -> the next layer's FFN, which is not analysed.
        missing: why no norm is known; None when they are.
    """

    following: Mapping[FFNSite, FFNSite]
    norms: Mapping[FFNSite, Tensor] = field(default_factory=dict[FFNSite, Tensor])
    skipped: Mapping[FFNSite, FFNSite] = field(default_factory=dict[FFNSite, FFNSite])
    missing: str | None = None


def find_neighbours(model: nn.Module, sites: Sequence[FFNSite]) -> Neighbours:
    """Find what follows each FFN; the model is run on a few tokens and left as it was."""
    analysed = [site for site in sites if site.role == "ffn"]
    every = following(survey(model).sites)
    here = {a: b for a, b in every.items() if a in analysed and b in analysed}
    skipped = {a: b for a, b in every.items() if a in analysed and b not in analysed}
    try:
        steps = find_stream(model, analysed).steps
    except LayoutError as error:
        return Neighbours(here, {}, skipped, str(error))
    norms = {reader.site: reader.norm for step in steps for reader in step if reader.norm is not None}
    return Neighbours(here, norms, skipped)


def no_neighbour(site: FFNSite, around: Neighbours) -> str:
    """Why an FFN has no next one to be compared with."""
    if site in around.following:
        return "statistics of the next layer were not collected"
    if site in around.skipped:
        return f"the FFN of the next layer, {around.skipped[site].name}, is not analysed"
    if site.expert is not None:
        return "it is an expert, whose tokens are not those of one FFN of the next layer"
    return "the next layer has no single dense FFN, or there is none"


def null_channels(core: Mapping[FFNSite, Tensor], pool: int | None = None, seed: int = 0) -> dict[FFNSite, Tensor]:
    """Channels to measure for null cores: the core, and ``pool`` random others of each FFN, sorted.

    Args:
        core: site -> channels.
        pool: how many others; None = 10 per core channel, at least 100. Fewer where the FFN has fewer.
        seed: of the choice.
    """
    random = torch.Generator().manual_seed(seed)
    found: dict[FFNSite, Tensor] = {}
    for site, index in core.items():
        others = torch.ones(site.d_ff, dtype=torch.bool).index_fill_(0, index, False).nonzero().flatten()
        size = default_pool(index.numel()) if pool is None else pool
        chosen = others[torch.randperm(others.numel(), generator=random)[:size]]
        found[site] = torch.cat([index, chosen]).sort().values
    return found


def places_of_core(site: FFNSite, core: Tensor, measured: Tensor) -> Tensor:
    """Places of the core among the measured channels of a site.

    Raises:
        UsageError: a core channel was not measured, or fewer others were than the core has channels.
    """
    here = torch.isin(measured, core)
    if int(here.sum()) < core.numel():
        raise UsageError(f"{site.name}: correlations were not measured for all channels of the core.")
    check_others(site, core.numel(), measured.numel() - core.numel())
    return here.nonzero().flatten()


def check_others(site: FFNSite, n_core: int, others: int) -> None:
    """Raise UsageError where a core leaves too few measured channels to draw null cores from."""
    if others < n_core:
        raise UsageError(
            f"{site.name}: null cores of {n_core} channels need as many others that are measured; got {others}. Make "
            "the core smaller, or the pool larger."
        )


def default_pool(n_core: int) -> int:
    """How many channels null cores of this size are drawn from."""
    return max(LEAST_POOL, POOL * n_core)


def bounded_pool(sites: Sequence[FFNSite], statistics: Sequence[str], n_core: int, asked: int | None = None) -> int:
    """The pool that is ``asked`` for, or 10 per core channel as far as the sums of ``statistics`` stay below 4 GiB.

    Raises:
        UsageError: fewer than two per core channel fit.
    """
    if asked is not None:
        return asked
    each = statistics_bytes(sites, statistics, 1)
    most = max(site.d_ff for site in sites) - n_core if sites else 0
    fits = POOL_BYTES // each - n_core if each else most
    found = min(default_pool(n_core), most, fits)
    if found < min(2 * n_core, most):
        raise UsageError(
            f"null cores of {n_core} channels need sums of {each * 3 * n_core / 2**30:,.1f} GiB for {len(sites)} FFNs. "
            "Analyse fewer FFNs (model.tracked_layers), make the core smaller, or give supernode.null_pool."
        )
    return found
