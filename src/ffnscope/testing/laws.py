"""What the laws of metrics of either scope share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ffnscope.errors import ContractError, UsageError
from ffnscope.rules import Metric

SPECIAL = {0: "is never active", 1: "has no gradient", 2: "has zero weights"}
"""What is special about the first channels of a synthetic site."""


def check_parameters(rule: Metric) -> None:
    """Parameters are keyword-only and typed, with defaults."""
    extra = list(inspect.signature(rule.fn).parameters.values())[2:]
    for p in extra:
        if p.kind is p.KEYWORD_ONLY and p.name in rule.inputs:
            continue
        if p.kind is not p.KEYWORD_ONLY or p.annotation is p.empty or p.default is p.empty:
            raise broken(rule, "typed parameters", f"{p.name!r} must be keyword-only, with a type and a default")


def check_values(rule: Metric, values: Any, d_ff: int) -> None:
    """One finite value per channel of a site."""
    if not isinstance(values, Tensor) or values.shape != (d_ff,) or not values.is_floating_point():
        found = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise broken(rule, "shape", f"returned {found}; expected floating ({d_ff},) = (d_ff,)")
    bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
    if bad:
        why = SPECIAL.get(bad[0], "is an ordinary one")
        raise broken(rule, "finite scores", f"channel {bad[0]}, which {why}, got {float(values[bad[0]])}")


def check_state(rule: Metric, state: Tensor) -> None:
    """The global random state is still ``state``."""
    if not torch.equal(state, torch.get_rng_state()):
        raise broken(rule, "purity", "it changed the global random state; draw from a torch.Generator of its own")


def call(rule: Metric, run: Callable[[], Any]) -> Any:
    """Run a metric; a statistic that is missing is a broken law."""
    try:
        return run()
    except UsageError as error:
        raise broken(rule, "declared needs", f"with statistics {list(rule.needed({}))} it raised: {error}") from error


def is_seeded(rule: Metric) -> bool:
    """Whether a metric is random by design."""
    return "seed" in rule.params


def near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Within ``tolerance`` of each value, or of a thousandth of the largest."""
    floor = tolerance * 1e-3 * float(expected.abs().max())
    return torch.allclose(found.double(), expected.double(), rtol=tolerance, atol=floor)


def broken(rule: Metric, law: str, what: str) -> ContractError:
    """Error for a broken law."""
    return ContractError(f"metric {rule.name!r} breaks the law of {law}: {what}.")
