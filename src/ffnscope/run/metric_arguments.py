"""Parameters of metrics in the YAML, checked against the types that the metric's own signature declares."""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from ffnscope.errors import UsageError
from ffnscope.rules import Metric

_FIELD = "arg_"
"""Set before the names of parameters, which are then free to be those of pydantic's own methods."""


def arguments_model(metric: Metric) -> type[BaseModel]:
    """Build the model of a metric's keyword-only parameters: unknown ones are refused, types are strict."""
    return create_model(
        metric.name,
        __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True),
        **_fields(metric),
    )


def parse_arguments(metric: Metric, given: dict[str, Any]) -> dict[str, Any]:
    """Check and convert parameters; raises pydantic's ValidationError. Lists become tuples where the metric says so."""
    model = arguments_model(metric)
    parsed = model.model_validate_json(json.dumps(given, default=repr))
    return {name: getattr(parsed, _FIELD + name) for name in given}


def _fields(metric: Metric) -> dict[str, Any]:
    params = metric.params
    hints = _hints(metric)
    missing = inspect.Parameter.empty
    return {
        _FIELD + name: (hints.get(name, Any), Field(... if p.default is missing else p.default, alias=name))
        for name, p in params.items()
    }


def _hints(metric: Metric) -> dict[str, Any]:
    """Types of the keyword-only parameters alone: others may name types that only a type checker imports."""
    written = {k: p.annotation for k, p in metric.params.items() if p.annotation is not inspect.Parameter.empty}
    scope = getattr(inspect.unwrap(metric.fn), "__globals__", {})
    try:
        return get_type_hints(SimpleNamespace(__annotations__=written), globalns=scope, include_extras=True)
    except NameError as error:
        raise UsageError(
            f"metric {metric.name!r}: the type of a parameter cannot be read ({error}). Import it at run time."
        ) from error
