"""The parameter of a policy that meets a target, found exactly from the scores of calibration tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ffnscope.errors import UsageError, unknown_name
from ffnscope.ffn.function import FFN
from ffnscope.sparse.measures import Label, Truth, of_mask, truth_of, truths
from ffnscope.sparse.policies import Policy
from ffnscope.sparse.predictors.interface import Predictor
from ffnscope.sparse.quantile import Quantile, float_of, order_of, reach_all
from ffnscope.sparse.readings import Readings

QuantileMeasure = Literal["recall", "missed_mass", "density"]
"""Sums over channels, of which a level is a quantile of keys."""
Measure = Literal[QuantileMeasure, "relative_error"]

ERROR_TOLERANCE = 0.01
"""A search for a relative error ends when the error is at most this share below the target."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a calibrated selection should have on average over tokens.

    Attributes:
        measure: "recall" (at least), "missed_mass", "density" or "relative_error" (at most).
        value: in [0, 1].
    """

    measure: Measure
    value: float

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise unknown_name("target", self.measure, get_args(Measure))
        if not 0 <= self.value <= 1:
            raise UsageError(
                f"target {self.measure} must be in [0, 1]; got {self.value:g}. Write a share such as 0.95, or 95%."
            )


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A parameter that meets a target on the calibration tokens.

    Attributes:
        parameter: of the policy.
        achieved: what the measure is with it, on the tokens of the calibration.
        n_tokens: how many these were.
    """

    parameter: float
    achieved: float
    n_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Scores [T, d_ff] of some tokens, and the truth about them."""

    scores: Tensor
    truth: Truth


Chunks = Callable[[], Iterable[Scored]]
"""Makes the calibration tokens chunk by chunk, the same at every call."""


def scored(predictor: nn.Module, ffn: FFN, x: Tensor, label: Label, chunk: int = 1024) -> Chunks:
    """Score tokens x [T, d_model] by a predictor of their own inputs, ``chunk`` at a time, whenever asked for."""

    @torch.no_grad()
    def make() -> Iterator[Scored]:
        for part, truth in truths(ffn, x, label, chunk):
            yield Scored(predictor(part), truth)

    return make


def scored_readings(predictor: Predictor, readings: Readings, label: Label, chunk: int = 1024) -> Chunks:
    """The same of tokens as the predictor is given them."""

    @torch.no_grad()
    def make() -> Iterator[Scored]:
        norms = predictor.ffn.down_norms
        for x, seen in readings.chunks(predictor, chunk):
            yield Scored(predictor(seen), truth_of(predictor.ffn, x, label, norms))

    return make


def calibrate_policy(policy: Policy, chunks: Chunks, target: Target) -> Calibrated:
    """Find the parameter that keeps the fewest channels with which a target is met, on average over tokens.

    For recall, missed mass and density it is a quantile of the policy's keys, each weighted with what keeping the
    channel brings: 1 / |wanted channels of the token|, its share of the token's contributions, or 1. That takes two
    passes over the tokens and is exact to a float32. "density" is met from below: it is never exceeded, so ties that
    would exceed it are left out. The relative error is no sum over channels; it is bisected, one pass per step.

    Args:
        policy: which rule.
        chunks: calibration tokens, as `scored` makes them.
        target: what is wanted.

    Raises:
        UsageError: no token, or a target that this policy cannot meet (k_max of a capped threshold, a core that is
            always kept).
    """
    if target.measure == "relative_error":
        return _bisect_error(policy, chunks, target.value)
    (found,), free, n_tokens = _quantiles(policy, chunks, target.measure, [target.value])
    return _calibrated(policy, target, found, free, n_tokens)


def calibrate_ladder(
    policy: Policy, chunks: Chunks, measure: QuantileMeasure, values: Sequence[float]
) -> list[Calibrated | None]:
    """The same for several values of a measure, in two passes for all; None for a value that the policy cannot meet.

    Raises:
        UsageError: no token.
    """
    quantiles, free, n_tokens = _quantiles(policy, chunks, measure, values)
    found: list[Calibrated | None] = []
    for value, one in zip(values, quantiles, strict=True):
        try:
            found.append(_calibrated(policy, Target(measure, value), one, free, n_tokens))
        except UsageError:
            found.append(None)
    return found


def _calibrated(policy: Policy, target: Target, found: Quantile, free: float, n_tokens: int) -> Calibrated:
    level, weight = found.level, found.weight
    if level == -math.inf:  # these are never kept
        weight = found.above
    elif target.measure == "density" and weight > target.value * found.total * (1 + 1e-12) and level < math.inf:
        level, weight = float_of(int(order_of(torch.tensor(level))) + 1), found.above
    share = weight / found.total if target.measure == "density" else (weight + free) / n_tokens
    achieved = 1 - share if target.measure == "missed_mass" else share
    _check_met(policy, target, achieved)
    return Calibrated(policy.natural(level), achieved, n_tokens)


def mean_of(policy: Policy, chunks: Chunks, parameter: float, measure: Measure) -> tuple[float, int]:
    """Mean of a measure over tokens with a parameter, and the number of tokens."""
    total, n_tokens = 0.0, 0
    for one in chunks():
        values = of_mask(policy.select(one.scores, parameter), one.truth, (measure,))[measure]
        total, n_tokens = total + float(values.sum()), n_tokens + len(values)
    return total / n_tokens, n_tokens


def _quantiles(
    policy: Policy, chunks: Chunks, measure: QuantileMeasure, values: Sequence[float]
) -> tuple[list[Quantile], float, int]:
    """The level of each value of a measure, the number of tokens that want nothing, and the number of tokens."""
    free, n_tokens = 0.0, 0

    def weighted() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal free, n_tokens
        free, n_tokens = 0.0, 0
        for one in chunks():
            weights, without = _WEIGHTS[measure](one.truth)
            free, n_tokens = free + without, n_tokens + len(weights)
            yield policy.keys(one.scores), weights

    def wanted(total: float) -> list[float]:
        if measure == "density":
            return [value * total for value in values]
        kept = [1 - value if measure == "missed_mass" else value for value in values]
        return [share * n_tokens - free for share in kept]

    return reach_all(weighted, wanted), free, n_tokens


def _bisect_error(policy: Policy, chunks: Chunks, limit: float) -> Calibrated:
    """Bisect the level between the highest and the lowest key; the upper end is always one that was measured."""
    low, high = _range(policy, chunks)  # of the order of keys: low keeps all that can be kept

    def error(order: int) -> tuple[float, float, int]:
        parameter = policy.natural(float_of(order))
        return parameter, *mean_of(policy, chunks, parameter, "relative_error")

    best = error(low)
    _check_met(policy, Target("relative_error", limit), best[1])
    while high - low > 1 and best[1] < limit * (1 - ERROR_TOLERANCE):
        middle = (low + high) // 2
        found = error(middle)
        if found[1] <= limit:
            low, best = middle, found
        else:
            high = middle
    return Calibrated(*best)


def _range(policy: Policy, chunks: Chunks) -> tuple[int, int]:
    """Order of the lowest finite key, and one above any level that still changes something."""
    lowest, highest = 2**32, 0
    for one in chunks():
        keys = policy.keys(one.scores)
        finite = keys[torch.isfinite(keys)]
        if finite.numel():
            order = order_of(finite)
            lowest, highest = min(lowest, int(order.min())), max(highest, int(order.max()))
    if lowest > highest:
        raise UsageError("there is no token, or no channel that the parameter of this policy decides about.")
    return lowest, highest + 2


def _check_met(policy: Policy, target: Target, achieved: float) -> None:
    slack = 1e-9
    met = achieved >= target.value - slack if target.measure == "recall" else achieved <= target.value + slack
    if not met:
        raise UsageError(
            f"{type(policy).__name__} cannot reach {target.measure} {target.value:g}: the nearest it comes to is "
            f"{achieved:.4g}. Change the target, or the limits of the policy."
        )


def _recall_weights(truth: Truth) -> tuple[Tensor, float]:
    wanted = truth.labels.double()
    count = wanted.sum(-1, keepdim=True)
    return wanted / count.clamp_min(1), float((count == 0).sum())


def _mass_weights(truth: Truth) -> tuple[Tensor, float]:
    mass = truth.contributions.double()
    total = mass.sum(-1, keepdim=True)
    return mass / total.where(total > 0, 1.0), float((total == 0).sum())


def _equal_weights(truth: Truth) -> tuple[Tensor, float]:
    return torch.ones_like(truth.contributions), 0.0


_WEIGHTS: dict[QuantileMeasure, Callable[[Truth], tuple[Tensor, float]]] = {
    "recall": _recall_weights,
    "missed_mass": _mass_weights,
    "density": _equal_weights,
}
