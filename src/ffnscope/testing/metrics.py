"""The laws of a metric, checked on synthetic statistics of a gated and a plain FFN."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.registry import METRICS
from ffnscope.rules import SIGNALS, Metric
from ffnscope.testing.laws import broken, call, check_parameters, check_state, check_values, is_seeded, near
from ffnscope.testing.model_metrics import check_model_metric
from ffnscope.types import ChannelStats, FFNSite, FFNWeights

WINDOWS, LENGTH, D_MODEL, D_FF = 4, 32, 8, 36


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    """One synthetic FFN: x, y and dy [WINDOWS, LENGTH, D_MODEL], h and g [WINDOWS, LENGTH, D_FF], weights and what a
    metric may need beyond them, all float64."""

    site: FFNSite
    x: Tensor
    h: Tensor
    y: Tensor
    dy: Tensor
    g: Tensor
    weights: FFNWeights
    core: Tensor
    reference: FFNWeights

    def stats(self, rule: Metric, first: int = 0, last: int = WINDOWS) -> ChannelStats:
        """Statistics that the metric needs, over windows ``first`` to ``last``."""
        sums = Accumulator([self.site], rule.needed({}), {self.site: self.core})
        n = last - first
        sums.begin(torch.ones(n, LENGTH, dtype=torch.bool), n * (LENGTH - 1))
        for name in SIGNALS[:-1]:
            sums.observe_signal(self.site, name, getattr(self, name)[first:last])
        if sums.backward:
            sums.observe_gradient(self.site, self.h[first:last], self.g[first:last])
        return sums.result()[self.site]

    def inputs(self, rule: Metric) -> dict[str, Any]:
        """What the metric gets beyond statistics and weights."""
        return {name: {"core": self.core, "reference": self.reference}[name] for name in rule.inputs}


def check_metric(metric: str | Metric) -> None:
    """Check that a metric keeps the laws of its kind; silent when it does.

    The laws: parameters are keyword-only and typed, with defaults; only declared statistics are read; one finite value
    per channel, also for channels that are never active, have no gradient or zero weights; statistics, weights, core
    and reference are not changed; the same arguments give the same scores, whatever the global random state, which is
    left alone; statistics gathered in parts give the scores of the whole; channels in another order give the scores in
    that order; bfloat16 and float32 weights give the scores of the same values in float64 (to 0.1 %); CUDA gives the
    scores of the CPU, where there is one.

    A metric with a parameter ``seed`` is random by design: it is excused from the order of channels, and two seeds
    must give different scores.

    A metric of scope "model" is given a synthetic `DecoderGraph` of three layers and the statistics of all their sites.
    It must return one vector for each site, and must not depend on the order of the channels of any of them.

    Args:
        metric: a registered name, or an unregistered `Metric`.

    Raises:
        ContractError: a law is broken; the message names it.
        UnknownNameError: no metric or needed statistic of that name.
    """
    rule = METRICS.get(metric) if isinstance(metric, str) else metric
    check_parameters(rule)
    if rule.scope == "model":
        check_model_metric(rule)
        return
    for gated in (True, False):
        case = _case(gated)
        stats = case.stats(rule)
        inputs = case.inputs(rule)
        values = _check_purity(rule, stats, case.weights, inputs)
        check_values(rule, values, D_FF)
        _check_determinism(rule, stats, case.weights, inputs)
        _check_split(rule, case, values)
        _check_order(rule, case, values)
        _check_dtypes(rule, stats, case.weights, inputs)
        if torch.cuda.is_available():
            _check_cuda(rule, stats, case, values)


def _case(gated: bool) -> _Case:
    """Random signals and weights, with channel 0 never active, 1 without gradient, 2 with zero weights."""
    random = torch.Generator().manual_seed(17 + gated)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    spread = torch.linspace(-2, 2, D_FF, dtype=torch.float64).exp2()
    h, g = draw(WINDOWS, LENGTH, D_FF) * spread + 0.1, draw(WINDOWS, LENGTH, D_FF) * 0.01
    h[..., 0] = 0
    g[..., 1] = 0
    g[:, -1] = 0  # nothing is predicted from the last token
    gate, up, down = draw(D_FF, D_MODEL), draw(D_FF, D_MODEL), draw(D_MODEL, D_FF)
    gate[2], up[2], down[:, 2] = 0, 0, 0
    names = ("gate", "up", "down") if gated else (None, "up", "down")
    site = FFNSite(0, "layers.0.mlp", *names, D_MODEL, D_FF)
    gate_bias = draw(D_FF) if gated else None
    weights = FFNWeights(gate if gated else None, up, down, gate_bias, draw(D_FF), draw(D_MODEL))
    before = FFNWeights(gate + 0.1 * draw(D_FF, D_MODEL) if gated else None, up + 0.1 * draw(D_FF, D_MODEL), down)
    x, y, dy = (draw(WINDOWS, LENGTH, D_MODEL) for _ in range(3))
    dy[:, -1] = 0
    return _Case(site, x, h, y, dy, g, weights, torch.tensor([5, 7]), before)


def _check_purity(rule: Metric, stats: ChannelStats, weights: FFNWeights, inputs: dict[str, Any]) -> Tensor:
    """Return the scores of the first call; a later one would not show a change that is made only once."""
    given = [*stats.values.values(), *inputs.values(), weights]
    tensors = [t for one in given for t in (_present(one) if isinstance(one, FFNWeights) else [one])]
    before, state = [t.clone() for t in tensors], torch.get_rng_state()
    values = _call(rule, stats, weights, inputs)
    if not all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True)):
        raise broken(rule, "purity", "it changed its statistics, weights or inputs; work on a copy")
    check_state(rule, state)
    return values


def _check_determinism(rule: Metric, stats: ChannelStats, weights: FFNWeights, inputs: dict[str, Any]) -> None:
    with torch.random.fork_rng():
        found: list[Tensor] = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append(_call(rule, stats, weights, inputs))
    if not torch.equal(*found):
        raise broken(rule, "determinism", "two calls with the same arguments gave different scores")
    if not is_seeded(rule):
        return
    if torch.equal(found[0], rule.fn(stats, weights, seed=rule.params["seed"].default + 1, **inputs)):
        raise broken(rule, "determinism", "two seeds gave the same scores; a metric without chance has no 'seed'")


def _check_split(rule: Metric, case: _Case, values: Tensor) -> None:
    joined = case.stats(rule, 0, 1).merge(case.stats(rule, 1, WINDOWS))
    if not near(_call(rule, joined, case.weights, case.inputs(rule)), values, 1e-9):
        what = f"statistics {list(rule.needed({}))} gathered in two parts and merged gave other scores than the whole"
        raise broken(rule, "batch split", f"{what}; a statistic must be a sum or a maximum over tokens")


def _check_order(rule: Metric, case: _Case, values: Tensor) -> None:
    if is_seeded(rule):
        return
    order = torch.randperm(D_FF, generator=torch.Generator().manual_seed(3))
    weights, core = _permuted(case.weights, order), torch.argsort(order)[case.core].sort().values
    reference = _permuted(case.reference, order)
    moved = replace(case, h=case.h[..., order], g=case.g[..., order], weights=weights, core=core, reference=reference)
    if not near(_call(rule, moved.stats(rule), weights, moved.inputs(rule)), values[order], 1e-9):
        raise broken(rule, "order of channels", "channels in another order did not give the scores in that order")


def _permuted(w: FFNWeights, order: Tensor) -> FFNWeights:
    rows = [None if t is None else t[order] for t in (w.gate, w.up, w.gate_bias, w.up_bias)]
    return replace(w, gate=rows[0], up=rows[1], down=w.down[:, order], gate_bias=rows[2], up_bias=rows[3])


def _check_dtypes(rule: Metric, stats: ChannelStats, weights: FFNWeights, inputs: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        low, low_inputs = _cast(weights, dtype=dtype), _cast_inputs(inputs, dtype)
        values = _call(rule, stats, low, low_inputs)
        exact = _call(rule, stats, _cast(low, dtype=torch.float64), _cast_inputs(low_inputs, torch.float64))
        check_values(rule, values, D_FF)
        if not near(values.double(), exact, 1e-3):
            what = f"{dtype} weights gave scores that differ by more than 0.1 % from the same values in float64"
            raise broken(rule, "weight dtype", f"{what}; reduce in float32")


def _check_cuda(rule: Metric, stats: ChannelStats, case: _Case, values: Tensor) -> None:
    moved = ChannelStats(stats.site, {k: v.cuda() for k, v in stats.values.items()}, stats.counts, stats.reductions)
    weights, inputs = _cast(case.weights, device="cuda"), case.inputs(rule)
    if not near(_call(rule, moved, weights, inputs).cpu(), values, 1e-6):
        raise broken(rule, "device", "CUDA gave other scores than the CPU")


def _call(rule: Metric, stats: ChannelStats, weights: FFNWeights, inputs: dict[str, Any]) -> Tensor:
    return call(rule, lambda: rule.fn(stats, weights, **inputs))


def _present(weights: FFNWeights) -> list[Tensor]:
    tensors: list[Tensor | None] = [getattr(weights, f.name) for f in fields(weights)]
    return [t for t in tensors if t is not None]


def _cast(weights: FFNWeights, **to: Any) -> FFNWeights:
    tensors: list[Any] = [getattr(weights, f.name) for f in fields(weights)]
    cast: list[Any] = [None if t is None else t.to(**to) for t in tensors]
    return FFNWeights(*cast)


def _cast_inputs(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: _cast(v, dtype=dtype) if isinstance(v, FFNWeights) else v for k, v in inputs.items()}
