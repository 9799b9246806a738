"""The ``sweep`` block of a YAML file: which runs one file asks for, and what executes them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import combinations, product
from typing import Any, Literal

from pydantic import ConfigDict, Field, JsonValue, StrictStr, model_validator

from ffnscope.run.document import KeyPath, Problem, describe
from ffnscope.run.fields import Block, Count, Keywords, did_you_mean, refuse

Settings = dict[StrictStr, JsonValue]
"""Dotted key -> value: what a cell sets in the rest of the file, as ``--set`` does."""
_REPLACES = "one cell would set both {} and {}, and one of them would replace the other. Keep one"


class Sweep(Block):
    """Several runs from one file: every combination of the values listed here, and the cells named beside them.

    A further key is an axis. A dotted one (experiment.seed) lists values of that key. One without a dot is a name of
    your own, for keys that change together: a mapping from labels to what each sets.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Any] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    cells: tuple[Settings, ...] = ()
    """Further cells: what each sets in the rest of the file, by dotted keys."""
    executor: Literal["sequential", "auto", "ray", "submitit"] = "sequential"
    """sequential: one cell after the other in this process; auto: ray if it is installed, else sequential; ray;
    submitit: SLURM, or processes where there is none."""
    workers: Count | None = None
    """Cells at the same time, with ray and submitit; null: all are handed over at once."""
    resources: Keywords = Field(default_factory=dict)
    """What a cell gets: options of ray.remote (num_gpus), or of submitit's update_parameters (timeout_min,
    gpus_per_node, slurm_partition)."""

    @model_validator(mode="after")
    def _check_useful(self) -> Sweep:
        if self.executor == "sequential" and (self.workers is not None or self.resources):
            raise refuse("'workers' and 'resources' would do nothing with 'executor: sequential'. Leave them out")
        if not (self.listed or self.cells):
            raise refuse("asks for no run: list the values of a key, for example experiment.seed: [0, 1]")
        return self

    @property
    def engine(self) -> Literal["sequential", "ray", "submitit"]:
        """The executor that is taken on this machine."""
        if self.executor == "auto":
            return "sequential" if find_spec("ray") is None else "ray"
        return self.executor

    @property
    def listed(self) -> dict[str, Any]:
        """The axes as they were written; `sweep_problems` says what is wrong with them."""
        return dict(self.__pydantic_extra__ or {})


def sweep_problems(sweep: Sweep) -> Iterator[Problem]:
    """Yield what is wrong with axes and cells; keys and values themselves are checked as part of each run."""
    taken: list[str] = []
    for name, value in sweep.listed.items():
        path: KeyPath = ("sweep", name)
        yield from (Problem(path, message) for message in _axis_faults(name, value))
        keys = [name] if "." in name else _keys_of(value)
        yield from (Problem(path, _REPLACES.format(*pair)) for pair in product(keys, taken) if _overlap(*pair))
        taken += keys
    for i, cell in enumerate(sweep.cells):
        yield from (Problem(("sweep", "cells", i), message) for message in _settings_faults(cell))


def _axis_faults(name: str, value: Any) -> Iterator[str]:
    if "." in name:
        yield from _key_faults(name)
        if not isinstance(value, list) or not value:
            yield f"expected a list of its values; got {describe(value) if value != [] else 'an empty list'}"
        elif any(one in value[:i] for i, one in enumerate(value)):
            yield "lists a value twice; list each once"
        return
    if not isinstance(value, dict) or not value:
        hint = did_you_mean(name, Sweep.model_fields)
        yield f"expected a dotted key with a list of values, or a name with a mapping from labels to keys.{hint}"
        return
    for label, settings in value.items():
        if isinstance(settings, dict) and settings:
            yield from (f"{label}: {fault}" for fault in _settings_faults(settings))
        else:
            yield f"{label}: expected dotted keys and values, for example {{pruning.method: best}}"


def _settings_faults(settings: dict[str, Any]) -> Iterator[str]:
    if not settings:
        yield "sets nothing. Give dotted keys and values"
    for key in settings:
        yield from _key_faults(key)
    yield from (_REPLACES.format(*pair) for pair in combinations(settings, 2) if _overlap(*pair))


def _key_faults(key: str) -> Iterator[str]:
    parts = key.split(".")
    if len(parts) < 2 or not all(parts):
        yield f"{key!r} is no dotted key such as pruning.ratios"
    elif key == "output.dir":
        yield "output.dir cannot differ by cell: every cell has its own folder below it"


def _keys_of(value: Any) -> list[str]:
    """Keys that the labels of a named axis set, each once."""
    settings = [one for one in value.values() if isinstance(one, dict)] if isinstance(value, dict) else []
    return list(dict.fromkeys(key for one in settings for key in one))


def _overlap(a: str, b: str) -> bool:
    """Whether one key is, or lies in, the other."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")
