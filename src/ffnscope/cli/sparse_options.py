"""Options of sparsify and answer: predictors and policies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ffnscope.errors import UsageError
from ffnscope.run.document import DocumentError, parse_value
from ffnscope.sparse.rule import SelectionRule, rule_of
from ffnscope.sparse.tracing import TraceOptions

MAX_TRACES = TraceOptions().max_bytes / 2**30
MaxTraces = Annotated[float, typer.Option("--max-traces", help="GiB of disk that the traces of a text may take.")]


@dataclass(frozen=True, slots=True)
class RuleChoice:
    """Which scores, and which rule takes channels by them."""

    predictor: Annotated[
        str, typer.Option(help="What scores the channels of a token (`ffnscope predictors list`).")
    ] = "low_bit"
    policy: Annotated[
        str, typer.Option(help="Rule that keeps channels by their scores (`ffnscope predictors list`).")
    ] = "nucleus"
    predictor_param: Annotated[
        list[str] | None, typer.Option("--predictor-param", help="NAME=VALUE of the predictor; repeatable.")
    ] = None
    policy_param: Annotated[
        list[str] | None, typer.Option("--policy-param", help="NAME=VALUE of the policy; repeatable.")
    ] = None

    def rule(self) -> SelectionRule:
        """Check and join them; raises UsageError."""
        own = params_of("--predictor-param", self.predictor_param)
        return rule_of(self.predictor, self.policy, own, params_of("--policy-param", self.policy_param))


def trace_bytes(gib: float) -> int:
    """Bytes of ``--max-traces``; raises UsageError."""
    if not 0 < gib < 2**20:
        raise UsageError(f"--max-traces must be a positive number of GiB; got {gib:g}.")
    return max(1, round(gib * 2**30))


def params_of(option: str, items: Iterable[str] | None) -> dict[str, Any]:
    """Parse ``NAME=VALUE`` options; raises UsageError."""
    found: dict[str, Any] = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not (name and equals):
            raise UsageError(f"{option} {item!r} is not NAME=VALUE, for example bits=3.")
        try:
            found[name] = parse_value(value)
        except DocumentError as error:
            raise UsageError(f"{option} {item}: {error}.") from error
    return found
