"""JSON Schema of the YAML, for editors: completion, hover texts and red underlines."""

from __future__ import annotations

from typing import Any

from ffnscope.registry import ALLOCATORS, METRICS
from ffnscope.run.explain import ALIASES
from ffnscope.run.fields import NAMES_OF
from ffnscope.run.metric_arguments import arguments_model
from ffnscope.run.schema import RunConfig
from ffnscope.run.sweep_block import Sweep

_OWN = "ffnscope."
_DOTTED = r"^[^.]+(\.[^.]+)+$"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a run's YAML.

    It lists the metrics and allocators that ffnscope brings; names from other packages are accepted by it too. Rules
    between blocks, and what is not available in this version, are checked by `load_config` alone.
    """
    schema = _expand_names(RunConfig.model_json_schema())
    for alias, name in ALIASES.items():
        block = _properties(schema, alias[0])
        block[alias[-1]] = {**block[name], "description": f"Another name of {name}."}
    metrics = schema["$defs"]["Metrics"]
    for name in METRICS.names():
        if METRICS.get(name).fn.__module__.startswith(_OWN):
            metrics["properties"][name] = _arguments(name)
    metrics["additionalProperties"] = {"type": ["object", "null"], "description": "Parameters of a metric."}
    schema["properties"]["sweep"] = _sweep()
    _name_a_model(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "ffnscope run"}


def _name_a_model(schema: dict[str, Any]) -> None:
    """Ask for the name of a model where there is no sweep, whose cells may each name their own."""
    model = schema["$defs"][schema["properties"]["model"]["$ref"].rsplit("/", 1)[-1]]
    named = {"model": {"required": model.pop("required")}}
    schema["anyOf"] = [{"required": ["sweep"]}, {"required": schema.pop("required"), "properties": named}]


def _properties(schema: dict[str, Any], block: str) -> dict[str, Any]:
    reference: str = schema["properties"][block]["$ref"]
    return schema["$defs"][reference.rsplit("/", 1)[-1]]["properties"]


def _arguments(name: str) -> dict[str, Any]:
    metric = METRICS.get(name)
    found = arguments_model(metric).model_json_schema()
    return {**found, "description": f"Parameters of {name}. {metric.summary}"}


def _sweep() -> dict[str, Any]:
    """Several runs from one file: a dotted key with its values, or a name with what each of its labels sets."""
    found = Sweep.model_json_schema()
    del found["$defs"]  # those of the run have them
    settings = {"type": "object", "minProperties": 1, "patternProperties": {_DOTTED: {}}, "additionalProperties": False}
    values = {"type": "array", "minItems": 1, "uniqueItems": True}
    found["properties"]["cells"]["items"] = settings
    found["patternProperties"] = {_DOTTED: {**values, "description": "Values of this key."}}
    named = {"type": "object", "minProperties": 1, "additionalProperties": settings}
    found["additionalProperties"] = {**named, "description": "Labels, and the keys that each of them sets."}
    return found


def _expand_names(value: Any) -> Any:
    """Replace the mark of a registered name by the list of names."""
    if isinstance(value, list):
        return [_expand_names(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _expand_names(item) for key, item in value.items()}
    kind = found.pop(NAMES_OF, None)
    if kind is None:
        return found
    registry: Any = METRICS if kind == METRICS.kind else ALLOCATORS
    items = map(registry.get, registry.names())
    names = [one.name for one in items if one.fn.__module__.startswith(_OWN)]
    found.pop("type", None)
    return {**found, "anyOf": [{"enum": names}, {"type": "string"}]}
