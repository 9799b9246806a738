"""What reading rows and selecting them take beside the dense FFNs of a model, timed on their own weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.ffn.projection import weights_of
from ffnscope.sparse.kernels.break_even import Forms, RowTimes, row_times, share_of_dense
from ffnscope.sparse.monitor import Watched
from ffnscope.sparse.products import Products
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
    mask = torch.rand(n_tokens, site.d_ff, generator=torch.Generator().manual_seed(0)).to(weight.device) < 0.5
    every = list(uses.values())
    dense, masked = [_dense(use, x) for use in every], [_masked(use, x, mask) for use in every]
    forms = Forms(dense, masked, [_reading(use, x[:, 0]) for use in every])
    return row_times(key, site.d_ff, forms, weight.device)


def decoding_time(
    model: nn.Module, timed: Mapping[FFNSite, tuple[ModuleUse | ProjectionUse, Watched]], selector: Watched
) -> float:
    """Time of selecting for one token, with what a monitor adds, and of reading as many channels as the card says, over
    that of the dense FFN; measured once per kind and twentieth of the channels.

    Args:
        model: whose weights are read.
        timed: FFNs that are alike, with their selectors, of which those of the kind of ``selector`` take turns.
        selector: whose kind and density are asked about.
    """
    kind, twentieths = _kind(selector), math.ceil(20 * selector.card.density - 1e-9)
    site = selector.card.site
    weight = weights_of(model, site).up
    x = _inputs(site, weight, 1)
    runs = [_deciding(use, one, x[:, 0], twentieths / 20) for use, one in timed.values() if _kind(one) == kind]
    levels = tuple(sorted({type(use).__name__ for use, _ in timed.values()}))
    key = (shape_key(site), levels, weight.dtype, kind, twentieths)
    return share_of_dense(key, [_dense(use, x) for use, _ in timed.values()], runs, weight.device)


def _kind(selector: Watched) -> tuple[Any, ...]:
    """What the time of a selector depends on: which predictor and policy, and how much is read."""
    predictor, policy = selector.selector.predictor, selector.selector.policy
    return type(predictor), predictor.bytes_read, type(policy)


def _inputs(site: FFNSite, weight: Tensor, n_tokens: int) -> Tensor:
    return torch.randn(n_tokens, 1, site.d_model, generator=torch.Generator().manual_seed(0)).to(weight)


def _dense(use: ModuleUse | ProjectionUse, x: Tensor) -> Callable[[], object]:
    return lambda: use.dense(x)


def _masked(use: ModuleUse | ProjectionUse, x: Tensor, mask: Tensor) -> Callable[[], object]:
    return lambda: use.under(mask, x)


def _reading(use: ModuleUse | ProjectionUse, x: Tensor) -> Callable[[Tensor], object]:
    return lambda index: use.sparse(x, index)


class _Drawn:
    """A selector that takes the time of another one, whose masks are drawn: for inputs that are no text."""

    def __init__(self, selector: Watched, density: float, device: torch.device):
        d_ff, draw = selector.card.site.d_ff, torch.Generator().manual_seed(0)
        k = round(density * d_ff)
        drawn = [torch.randperm(d_ff, generator=draw).lt(k)[None].to(device) for _ in range(8)]
        self._selector, self._masks = selector.fresh(), itertools.cycle(drawn)  # what is seen here is not to be watched

    def __call__(self, x: Tensor) -> Tensor:
        return self.select_and_read(x)[0]

    def select_and_read(self, x: Tensor) -> tuple[Tensor, Products]:
        _, known = self._selector.select_and_read(x)
        return next(self._masks), known


def _deciding(use: ModuleUse | ProjectionUse, watched: Watched, x: Tensor, density: float) -> Callable[[], object]:
    drawn = _Drawn(watched, density, x.device)
    selection = Selection(watched.card.site, drawn, Step(length=1), lambda n_tokens: 1.0)

    def run() -> object:
        choice = selection.choose(x)
        assert choice.index is not None, "its limit is 1"
        return use.sparse(x, choice.index, choice.known)

    return run
