"""What pydantic found wrong -> one sentence for the user."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from ffnscope.registry import METRICS
from ffnscope.run.document import KeyPath, describe, show
from ffnscope.run.fields import did_you_mean
from ffnscope.run.schema import RunConfig

ALIASES: dict[tuple[str, ...], str] = {
    ("model", "torch_dtype"): "dtype",
    ("pruning", "sparsity_levels"): "ratios",
}
"""Second name of a key -> the name of the schema."""

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list, for example [a, b]",
    "list_type": "a list, for example [a, b]",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "finite_number": "a finite number",
    "invalid-json-value": "a plain value (text, number, true, false, null, list or mapping)",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def explain(error: Any) -> str:
    """Return the sentence for one item of ``ValidationError.errors()``."""
    kind, path, found = error["type"], tuple(error["loc"]), error["input"]
    if kind == "ffnscope":
        return error["msg"]
    if kind == "missing":
        what = ": a hub id, a local directory, a .gguf file, or package:DIST" if path[-1] == "model_id" else ""
        return f"this key is required{what}"
    if kind == "extra_forbidden":
        return unknown_key(path)
    if kind == "literal_error":
        known = [part.strip("'") for part in error["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        hint = did_you_mean(found, known) if isinstance(found, str) else ""
        return f"expected {error['ctx']['expected']}; got {describe(found)}.{hint}"
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"must be {words} {error['ctx'][key]}; got {describe(found)}"
    if kind in _EXPECTED:
        quotes = kind == "string_type" and isinstance(found, (bool, int, float))
        return f"expected {_EXPECTED[kind]}; got {describe(found)}{' (put it in quotes)' if quotes else ''}"
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}; got {describe(found)}"


def unknown_key(path: KeyPath) -> str:
    """Say that a key is not known, with the nearest key of its block, or the block in which such a key exists."""
    name = str(path[-1])
    siblings = sorted(
        key[-1] for key in known_keys() if len(key) == len(_plain(path)) and key[:-1] == _plain(path)[:-1]
    )
    elsewhere = [show(key) for key in known_keys() if key[-1] == name]
    hint = did_you_mean(name, siblings, 0.85)
    if not hint and elsewhere:
        hint = f" Did you mean {elsewhere[0]!r}?"
    hint = hint or did_you_mean(name, siblings)
    return f"unknown key {name!r}.{hint}" + ("" if hint else f" Known here: {', '.join(siblings)}")


def known_keys() -> list[tuple[str, ...]]:
    """Every key path of the schema, second names and metric names included; items of lists count as their list."""
    metrics = [("metrics", name) for name in METRICS.names()]
    return [*_keys(RunConfig, ()), *ALIASES, *metrics]


def _keys(block: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, field in block.model_fields.items():
        path = (*prefix, name)
        yield path
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _keys(inner, path)


def _plain(path: KeyPath) -> tuple[str, ...]:
    return tuple(key for key in path if isinstance(key, str))
