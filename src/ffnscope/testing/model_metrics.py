"""The laws of a metric of scope "model", checked on a synthetic graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.graph import Branch, DecoderGraph, Matrix
from ffnscope.registry import SIGNALS, Metric
from ffnscope.testing.laws import broken, call, check_state, check_values, is_seeded, near
from ffnscope.types import ChannelStats, FFNSite

WINDOWS, LENGTH, D_MODEL = 4, 32, 8
WIDTHS = {True: 36, False: 20}
"""d_ff of a gated and of a plain site."""
Stats = Mapping[FFNSite, ChannelStats]


@dataclass(frozen=True, slots=True, eq=False)
class _Site:
    """One synthetic FFN: signals [WINDOWS, LENGTH, width], and its weights by role, all float64."""

    site: FFNSite
    signals: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]

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
    sites = [_synthetic(layer, gated) for layer, gated in enumerate((True, False, True))]
    stats = _stats(rule, sites)
    values = _check_purity(rule, sites, stats)
    _check_determinism(rule, sites, stats, values)
    first, second = _stats(rule, sites, 0, 1), _stats(rule, sites, 1, WINDOWS)
    joined = {site: first[site].merge(second[site]) for site in first}
    _compare(rule, _call(rule, sites, joined), values, 1e-9, "batch split", "statistics gathered in two parts")
    if not is_seeded(rule):
        _check_order(rule, sites, values)
    _check_dtypes(rule, sites, stats)
    if torch.cuda.is_available():
        found = _call(rule, sites, stats, _to(device="cuda"))
        _compare(rule, {k: v.cpu() for k, v in found.items()}, values, 1e-6, "device", "CUDA")


def _synthetic(layer: int, gated: bool) -> _Site:
    """Random signals and weights, with channel 0 never active, 1 without gradient, 2 with zero weights."""
    random = torch.Generator().manual_seed(17 + layer)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    d_ff = WIDTHS[gated]
    names = ("gate", "up", "down") if gated else (None, "up", "down")
    site = FFNSite(layer, f"layers.{layer}.mlp", *names, D_MODEL, d_ff)
    widths = {"x": D_MODEL, "h": d_ff, "y": D_MODEL, "dy": D_MODEL, "g": d_ff}
    signals = {name: draw(WINDOWS, LENGTH, width) for name, width in widths.items()}
    signals["h"][..., 0] = 0
    signals["g"][..., 1] = 0
    signals["g"][:, -1] = signals["dy"][:, -1] = 0  # nothing is predicted from the last token
    weights = {name: draw(d_ff, D_MODEL) for name in ("gate", "up")[0 if gated else 1 :]}
    weights["down"] = draw(D_MODEL, d_ff)
    for name, weight in weights.items():
        (weight.T if name == "down" else weight)[2] = 0
    return _Site(site, signals, weights)


def _stats(rule: Metric, sites: list[_Site], first: int = 0, last: int = WINDOWS) -> dict[FFNSite, ChannelStats]:
    """Statistics that the metric needs, over windows ``first`` to ``last``."""
    sums = Accumulator([one.site for one in sites], rule.needed({}))
    n = last - first
    sums.begin(torch.ones(n, LENGTH, dtype=torch.bool), n * (LENGTH - 1))
    for one in sites:
        for name in SIGNALS[:-1]:
            sums.observe_signal(one.site, name, one.signals[name][first:last])
        if sums.backward:
            sums.observe_gradient(one.site, one.signals["h"][first:last], one.signals["g"][first:last])
    return sums.result()


Edit = Callable[[Tensor], Tensor]


def _to(**to: object) -> Edit:
    return lambda weight: weight.to(**to)  # type: ignore[arg-type]


def _graph(sites: list[_Site], edit: Edit) -> DecoderGraph:
    def matrix(one: _Site, role: str) -> Matrix:
        weight = edit(one.weights[role])
        return Matrix(f"{one.site.name}.{role}", (weight.shape[0], weight.shape[1]), partial(_same, weight))

    steps = [
        (Branch(one.site, matrix(one, "up"), matrix(one, "down"), matrix(one, "gate") if one.site.gate else None),)
        for one in sites
    ]
    return DecoderGraph(D_MODEL, tuple(steps))


def _same(weight: Tensor) -> contextlib.nullcontext[Tensor]:
    return contextlib.nullcontext(weight)


def _unchanged(weight: Tensor) -> Tensor:
    return weight


def _call(rule: Metric, sites: list[_Site], stats: Stats, edit: Edit = _unchanged) -> dict[FFNSite, Tensor]:
    found = call(rule, lambda: rule.fn(_graph(sites, edit), stats))
    if not isinstance(found, Mapping) or found.keys() != stats.keys():  # type: ignore[reportUnknownMemberType]
        raise broken(rule, "shape", f"it must return one vector for each of the {len(sites)} sites of its graph")
    for one in sites:
        check_values(rule, found[one.site], one.site.d_ff)
    return dict(found)  # type: ignore[reportUnknownArgumentType]


def _check_purity(rule: Metric, sites: list[_Site], stats: Stats) -> dict[FFNSite, Tensor]:
    """Return the scores of the first call; a later one would not show a change that is made only once."""
    tensors = [t for part in stats.values() for t in part.values.values()]
    tensors += [t for one in sites for t in one.weights.values()]
    before, state = [t.clone() for t in tensors], torch.get_rng_state()
    values = _call(rule, sites, stats)
    if not all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True)):
        raise broken(rule, "purity", "it changed its statistics or weights; work on a copy")
    check_state(rule, state)
    return values


def _check_determinism(rule: Metric, sites: list[_Site], stats: Stats, values: Mapping[FFNSite, Tensor]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        again = _call(rule, sites, stats)
    if not all(torch.equal(again[site], values[site]) for site in values):
        raise broken(rule, "determinism", "two calls with the same arguments gave different scores")
    if not is_seeded(rule):
        return
    other = rule.fn(_graph(sites, _unchanged), stats, seed=rule.params["seed"].default + 1)
    if all(torch.equal(other[site], values[site]) for site in values):
        raise broken(rule, "determinism", "two seeds gave the same scores; a metric without chance has no 'seed'")


def _check_order(rule: Metric, sites: list[_Site], values: Mapping[FFNSite, Tensor]) -> None:
    random = torch.Generator().manual_seed(3)
    for place, one in enumerate(sites):
        order = torch.randperm(one.site.d_ff, generator=random)
        moved = [other.moved(order) if i == place else other for i, other in enumerate(sites)]
        found = _call(rule, moved, _stats(rule, moved))
        expected = {site: value[order] if site == one.site else value for site, value in values.items()}
        _compare(rule, found, expected, 1e-9, "order of channels", "channels in another order")


def _check_dtypes(rule: Metric, sites: list[_Site], stats: Stats) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        values = _call(rule, sites, stats, _to(dtype=dtype))
        exact = _call(rule, sites, stats, lambda weight, dtype=dtype: weight.to(dtype).double())
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
