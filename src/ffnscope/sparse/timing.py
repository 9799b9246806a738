"""What reading rows and selecting them take beside the dense FFNs of a model, timed on their own weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.ffn.projection import weights_of
from ffnscope.sparse.kernels.break_even import RowTimes, row_times, share_of_dense
from ffnscope.sparse.monitor import Watched
from ffnscope.sparse.uses import Level, ModuleUse, ProjectionUse, Selection, Step
from ffnscope.types import FFNSite

Uses = Mapping[FFNSite, ModuleUse | ProjectionUse]


def shape_key(site: FFNSite) -> tuple[Any, ...]:
    """What the time of an FFN depends on, as far as its site tells."""
    return site.d_model, site.d_ff, site.gate is None, site.fused


def reading_times(model: nn.Module, uses: Uses, level: Level, n_tokens: int) -> RowTimes:
    """Times of FFNs that are alike, for so many tokens, over their dense ones; measured at the first call."""
    site = next(iter(uses))
    weight = weights_of(model, site).up
    x = _inputs(site, weight, n_tokens)
    key = (shape_key(site), level, n_tokens, weight.dtype)
    sparse = [_reading(use, x[:, 0]) for use in uses.values()]
    return row_times(key, site.d_ff, [_dense(use, x) for use in uses.values()], sparse, weight.device)


def selecting_time(
    model: nn.Module, timed: Mapping[FFNSite, tuple[ModuleUse | ProjectionUse, Watched]], selector: Watched
) -> float:
    """Time of selecting for one token, with what a monitor adds, over that of the dense FFN; measured once per kind.

    Args:
        model: whose weights are read.
        timed: FFNs that are alike, with their selectors, of which those of the kind of ``selector`` take turns.
        selector: whose kind is asked about.
    """
    kind = _kind(selector)
    site = selector.card.site
    weight = weights_of(model, site).up
    x = _inputs(site, weight, 1)
    runs = [_selecting(one, x[:, 0]) for _, one in timed.values() if _kind(one) == kind]
    key = (shape_key(site), weight.dtype, kind)
    return share_of_dense(key, [_dense(use, x) for use, _ in timed.values()], runs, weight.device)


def _kind(selector: Watched) -> tuple[Any, ...]:
    """What the time of a selector depends on: which predictor and policy, and how much is read."""
    predictor, policy = selector.selector.predictor, selector.selector.policy
    return type(predictor), predictor.bytes_read, type(policy)


def _inputs(site: FFNSite, weight: Tensor, n_tokens: int) -> Tensor:
    return torch.randn(n_tokens, 1, site.d_model, generator=torch.Generator().manual_seed(0)).to(weight)


def _dense(use: ModuleUse | ProjectionUse, x: Tensor) -> Callable[[], object]:
    return lambda: use.dense(x)


def _reading(use: ModuleUse | ProjectionUse, x: Tensor) -> Callable[[Tensor], object]:
    return lambda index: use.sparse(x, index)


def _selecting(watched: Watched, x: Tensor) -> Callable[[], object]:
    fresh = watched.fresh()  # what is seen here is no text
    selection = Selection(watched.card.site, fresh, Step(length=1), lambda n_tokens: 1.0)
    return lambda: selection.choose(x)
