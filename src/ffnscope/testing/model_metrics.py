"""The laws of a metric of scope "model", checked on a synthetic graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.graph import Branch, DecoderGraph, Matrix
from ffnscope.rules import GRADIENTS, SIGNALS, Metric
from ffnscope.testing.laws import broken, call, check_state, check_values, is_seeded, near
from ffnscope.types import ChannelStats, FFNSite, ObservedSite, Role

WINDOWS, LENGTH, D_MODEL = 4, 32, 8
WIDTHS = {True: 36, False: 20}
"""d_ff of a gated and of a plain site."""
SOURCES = torch.tensor([0, 1, 0, 1, 2, 3])
"""Row of the values that each channel of the attention reads."""
VOCABULARY = 10
Stats = Mapping[FFNSite, ChannelStats]
Found = Mapping[FFNSite, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Site:
    """One synthetic part: signals [WINDOWS, LENGTH, width], and its weights by role, all float64."""

    site: FFNSite
    signals: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]

    @property
    def is_ffn(self) -> bool:
        return self.site.role == "ffn"

    def moved(self, order: Tensor) -> _Site:
        """The same FFN with its channels in another order."""
        signals = {k: v[..., order] if k in ("h", "g") else v for k, v in self.signals.items()}
        weights = {k: v[:, order] if k == "down" else v[order] for k, v in self.weights.items()}
        return replace(self, signals=signals, weights=weights)


def check_model_metric(rule: Metric) -> None:
    """Check the laws of `ffnscope.testing.check_metric` for a metric of scope "model".

    Raises:
        ContractError: a law is broken; the message names it.
    """
    parts = _parts()
    stats = _stats(rule, parts)
    values = _check_purity(rule, parts, stats)
    _check_determinism(rule, parts, stats, values)
    first, second = _stats(rule, parts, 0, 1), _stats(rule, parts, 1, WINDOWS)
    joined = {site: first[site].merge(second[site]) for site in first}
    _compare(rule, _call(rule, parts, joined), values, 1e-9, "batch split", "statistics gathered in two parts")
    if not is_seeded(rule):
        _check_order(rule, parts, values)
    _check_dtypes(rule, parts, stats)
    if torch.cuda.is_available():
        found = _call(rule, parts, stats, _to(device="cuda"))
        _compare(rule, {k: v.cpu() for k, v in found.items()}, values, 1e-6, "device", "CUDA")


def _parts() -> list[_Site]:
    """A gated FFN, an attention, a plain FFN, a gated FFN; cuts before, between and after; the unembedding."""
    steps = [_ffn(0, gated=True), _attention(), _ffn(1, gated=False), _ffn(2, gated=True)]
    cuts = [_part(_observed("cut", f"cut{i}", D_MODEL), 40 + i, ("h", "g")) for i in range(len(steps) + 1)]
    head = _part(_observed("unembedding", "head", D_MODEL), 50, ("h", "g"), {"down": (VOCABULARY, D_MODEL)})
    return [*steps, *cuts, head]


def _observed(kind: Role, name: str, width: int) -> ObservedSite:
    return ObservedSite(0, name, None, "up", "down", D_MODEL, width, kind=kind)


def _ffn(layer: int, *, gated: bool) -> _Site:
    """Random signals and weights, with channel 0 never active, 1 without gradient, 2 with zero weights."""
    d_ff = WIDTHS[gated]
    names = ("gate", "up", "down") if gated else (None, "up", "down")
    site = FFNSite(layer, f"layers.{layer}.mlp", *names, D_MODEL, d_ff)
    shapes = dict.fromkeys(("gate", "up")[0 if gated else 1 :], (d_ff, D_MODEL))
    found = _part(site, 17 + layer, SIGNALS, {**shapes, "down": (D_MODEL, d_ff)})
    found.signals["h"][..., 0] = 0
    found.signals["g"][..., 1] = 0
    for name, weight in found.weights.items():
        (weight.T if name == "down" else weight)[2] = 0
    return found


def _attention() -> _Site:
    site = _observed("attention", "layers.1.attention", len(SOURCES))
    rows = int(SOURCES.max()) + 1
    return _part(site, 30, SIGNALS, {"up": (rows, D_MODEL), "down": (D_MODEL, len(SOURCES))})


def _part(
    site: FFNSite, seed: int, signals: tuple[str, ...], shapes: Mapping[str, tuple[int, int]] | None = None
) -> _Site:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    drawn = {name: draw(WINDOWS, LENGTH, site.d_ff if name in ("h", "g") else D_MODEL) for name in signals}
    for name in {*GRADIENTS} & {*drawn}:
        drawn[name][:, -1] = 0  # nothing is predicted from the last token
    return _Site(site, drawn, {role: draw(*shape) for role, shape in (shapes or {}).items()})


def _stats(rule: Metric, parts: list[_Site], first: int = 0, last: int = WINDOWS) -> dict[FFNSite, ChannelStats]:
    """Statistics that the metric needs, over windows ``first`` to ``last``."""
    sums = Accumulator([one.site for one in parts], rule.needed({}))
    n = last - first
    sums.begin(torch.ones(n, LENGTH, dtype=torch.bool), n * (LENGTH - 1))
    for one in parts:
        for name in SIGNALS[:-1]:
            if name in one.signals:
                sums.observe_signal(one.site, name, one.signals[name][first:last])
        if sums.backward:
            sums.observe_gradient(one.site, one.signals["h"][first:last], one.signals["g"][first:last])
    return sums.result()


Edit = Callable[[Tensor], Tensor]


def _to(**to: object) -> Edit:
    return lambda weight: weight.to(**to)  # type: ignore[arg-type]


def _graph(parts: list[_Site], edit: Edit) -> DecoderGraph:
    def matrix(one: _Site, role: str) -> Matrix:
        weight = edit(one.weights[role])
        return Matrix(f"{one.site.name}.{role}", (weight.shape[0], weight.shape[1]), partial(_same, weight))

    def branch(one: _Site) -> Branch:
        gate = matrix(one, "gate") if one.site.gate else None
        return Branch(one.site, matrix(one, "up"), matrix(one, "down"), gate, None if one.is_ffn else SOURCES)

    steps = [(branch(one),) for one in parts if one.site.role in ("ffn", "attention")]
    cuts = [one.site for one in parts if isinstance(one.site, ObservedSite) and one.site.role == "cut"]
    head = parts[-1]
    assert isinstance(head.site, ObservedSite)
    return DecoderGraph(D_MODEL, tuple(steps), tuple(cuts), matrix(head, "down"), head.site)


def _same(weight: Tensor) -> contextlib.nullcontext[Tensor]:
    return contextlib.nullcontext(weight)


def _unchanged(weight: Tensor) -> Tensor:
    return weight


def _call(rule: Metric, parts: list[_Site], stats: Stats, edit: Edit = _unchanged) -> dict[FFNSite, Tensor]:
    graph = _graph(parts, edit)
    found: Any = call(rule, lambda: rule.fn(graph, stats, **dict.fromkeys(rule.inputs, stats)))
    if not isinstance(found, Mapping) or set(cast(Found, found)) != set(graph.sites):
        raise broken(rule, "shape", f"it must return one vector for each of the {len(graph.sites)} sites of its graph")
    scores = dict(cast(Found, found))
    for site in graph.sites:
        check_values(rule, scores[site], site.d_ff)
    return scores


def _check_purity(rule: Metric, parts: list[_Site], stats: Stats) -> dict[FFNSite, Tensor]:
    """Return the scores of the first call; a later one would not show a change that is made only once."""
    tensors = [t for part in stats.values() for t in part.values.values()]
    tensors += [t for one in parts for t in one.weights.values()]
    before, state = [t.clone() for t in tensors], torch.get_rng_state()
    values = _call(rule, parts, stats)
    if not all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True)):
        raise broken(rule, "purity", "it changed its statistics or weights; work on a copy")
    check_state(rule, state)
    return values


def _check_determinism(rule: Metric, parts: list[_Site], stats: Stats, values: Mapping[FFNSite, Tensor]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        again = _call(rule, parts, stats)
    if not all(torch.equal(again[site], values[site]) for site in values):
        raise broken(rule, "determinism", "two calls with the same arguments gave different scores")
    if not is_seeded(rule):
        return
    seed = rule.params["seed"].default + 1
    other = rule.fn(_graph(parts, _unchanged), stats, seed=seed, **dict.fromkeys(rule.inputs, stats))
    if all(torch.equal(other[site], values[site]) for site in values):
        raise broken(rule, "determinism", "two seeds gave the same scores; a metric without chance has no 'seed'")


def _check_order(rule: Metric, parts: list[_Site], values: Mapping[FFNSite, Tensor]) -> None:
    random = torch.Generator().manual_seed(3)
    for place, one in enumerate(parts):
        if not one.is_ffn:
            continue
        order = torch.randperm(one.site.d_ff, generator=random)
        moved = [other.moved(order) if i == place else other for i, other in enumerate(parts)]
        found = _call(rule, moved, _stats(rule, moved))
        expected = {site: value[order] if site == one.site else value for site, value in values.items()}
        _compare(rule, found, expected, 1e-9, "order of channels", "channels in another order")


def _check_dtypes(rule: Metric, parts: list[_Site], stats: Stats) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        values = _call(rule, parts, stats, _to(dtype=dtype))
        exact = _call(rule, parts, stats, lambda weight, dtype=dtype: weight.to(dtype).double())
        _compare(rule, values, exact, 1e-3, "weight dtype", f"{dtype} weights")


def _compare(
    rule: Metric,
    found: Mapping[FFNSite, Tensor],
    expected: Mapping[FFNSite, Tensor],
    tolerance: float,
    law: str,
    what: str,
) -> None:
    for site, value in expected.items():
        if not near(found[site], value, tolerance):
            raise broken(rule, law, f"{what} gave other scores at {site.name}")
