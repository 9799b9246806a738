"""Options of sparsify and answer: targets, predictors and policies, and traces of a text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.ffn.load import LoadedModel
from ffnscope.run.document import DocumentError, parse_value
from ffnscope.run.progress import Reporter
from ffnscope.sparse.calibration import Target
from ffnscope.sparse.card_options import CardTarget, PerplexityTarget
from ffnscope.sparse.rule import SelectionRule
from ffnscope.sparse.traces import Traces
from ffnscope.sparse.tracing import TraceOptions, trace, traces_size

PROXY = {"bits": 4, "group": 64}


@dataclass(frozen=True, slots=True)
class RuleChoice:
    """Which scores, and which rule takes channels by them."""

    predictor: Annotated[str, typer.Option(help="What scores the channels of a token.")] = "low_bit"
    policy: Annotated[str, typer.Option(help="Rule that keeps channels by their scores.")] = "nucleus"
    predictor_param: Annotated[
        list[str] | None, typer.Option("--predictor-param", help="NAME=VALUE of the predictor; repeatable.")
    ] = None
    policy_param: Annotated[
        list[str] | None, typer.Option("--policy-param", help="NAME=VALUE of the policy; repeatable.")
    ] = None

    def rule(self) -> SelectionRule:
        """Check and join them; raises UsageError."""
        own = params_of("--predictor-param", self.predictor_param)
        given = (PROXY if self.predictor == "low_bit" else {}) | own
        return SelectionRule(self.predictor, self.policy, given, params_of("--policy-param", self.policy_param))


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


def target_of(text: str) -> CardTarget:
    """Parse ``MEASURE=VALUE``: recall=0.95, missed_mass=0.1, density=0.3, relative_error=0.2 or perplexity=+1%."""
    measure, equals, value = text.partition("=")
    try:
        percent = value.endswith("%")
        number = float(value.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        equals = ""
        number = 0.0
    if not equals:
        raise UsageError(
            f"--target {text!r} is not MEASURE=VALUE, for example recall=0.95, missed_mass=0.1, density=0.3, "
            "relative_error=0.2 or perplexity=+1%."
        )
    return PerplexityTarget(number) if measure == "perplexity" else Target(measure, number)  # type: ignore[arg-type]


def traced(loaded: LoadedModel, windows: Windows, folder: Path, label: str, reporter: Reporter, batch: int) -> Traces:
    """Trace a text, with its size told before."""
    size = traces_size(loaded.model, windows)
    reporter.say(f"traces of {label}: {size / 2**30:.2f} GiB in {folder}, removed at the end")
    with reporter.task(f"trace {label}", "FFNs") as update:
        return trace(loaded.model, windows, folder, options=TraceOptions(batch_size=batch), on_round=update)
