"""Scores and evaluation rows made by hand: no model, no text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from ffnscope.evaluate.compare import EvalRow
from ffnscope.registry import METRICS
from ffnscope.rules import Metric
from ffnscope.types import EvalResult, FFNSite, Scores

PROTOCOL = "non-overlapping blocks of 1024 tokens"


@pytest.fixture
def sites() -> Callable[..., list[FFNSite]]:
    def make(n_layers: int, d_ff: int = 64, experts: int = 0, step: int = 1) -> list[FFNSite]:
        return [
            FFNSite(layer, f"layers.{layer}.mlp", "gate_proj", "up_proj", "down_proj", 16, d_ff, expert=expert)
            for layer in range(0, n_layers * step, step)
            for expert in (range(experts) if experts else [None])
        ]

    return make


@pytest.fixture
def heavy() -> Callable[..., Scores]:
    """Positive scores that spread over many orders of magnitude."""

    def make(
        metric: str, sites: Sequence[FFNSite], seed: int = 0, change: Callable[[Tensor], Tensor] = torch.exp
    ) -> Scores:
        generator = torch.Generator().manual_seed(seed)
        return Scores(metric, {site: change(2.5 * torch.randn(site.d_ff, generator=generator)) for site in sites})

    return make


@pytest.fixture
def low_is_keep(monkeypatch: pytest.MonkeyPatch) -> str:
    """A registered metric whose natural value is low for channels to keep."""
    METRICS.names()
    name = "distance_for_this_test"
    item = Metric(name, lambda stats, weights: -weights.up.sum(1), (), "", -1, "weight", "")
    monkeypatch.setitem(METRICS._items, name, item)
    return name


@pytest.fixture
def row() -> Callable[..., EvalRow]:
    def make(
        metric: str | None,
        sparsity: float,
        perplexity: float,
        *,
        stderr: float | None = 0.05,
        achieved: float | None = None,
        dataset: str = "speeches",
        label: str = "",
    ) -> EvalRow:
        results = [EvalResult("perplexity", perplexity, "1", stderr, 65472, dataset, PROTOCOL)]
        if metric is not None:
            kl = math.log(perplexity / 10)
            results.append(EvalResult("kl_to_dense", kl, "nats/token", 0.01, 65472, dataset, PROTOCOL))
            results.append(EvalResult("top1_agreement", 10 / perplexity, "fraction", 0.002, 65472, dataset, PROTOCOL))
        name = label or (f"{metric} {sparsity:g}" if metric else "dense")
        found = sparsity if achieved is None else achieved
        return EvalRow(name, metric, sparsity, found, dataset, tuple(results))

    return make


@pytest.fixture
def rows(row: Callable[..., EvalRow]) -> list[EvalRow]:
    """The dense model, one metric and the floor at two sparsities."""
    return [
        row(None, 0.0, 10.0),
        row("random", 0.2, 40.0),
        row("wanda", 0.2, 12.34),
        row("random", 0.5, 1.25e7, stderr=2.5e5),
        row("wanda", 0.5, 100.0, stderr=1.5),
    ]
