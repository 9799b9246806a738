"""The cells of a sweep: their names, their configurations, and all that is wrong with any of them."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ffnscope.errors import ConfigError
from ffnscope.io import hash_json
from ffnscope.run.document import Document, Place, Problem, show
from ffnscope.run.explain import explain
from ffnscope.run.load import (
    AFTER_FILE,
    SWEEP,
    build,
    check_document,
    overlap,
    problem_lines,
    read_document,
    resolve,
    set_key,
)
from ffnscope.run.schema import RunConfig
from ffnscope.run.sweep_block import Sweep, sweep_problems

MOST_CELLS = 1000
LONGEST_LABEL, LONGEST_NAME = 40, 150
"""Characters of a value and of a whole name; what is longer ends in a hash."""
_HASH = 8


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: its values, and the name of its folder below ``output.dir``: ``method=best,seed=1``.
        labels: axis -> its value in short.
        config: the base configuration with the values set.
    """

    name: str
    labels: Mapping[str, str]
    config: RunConfig


@dataclass(frozen=True, slots=True)
class SweepConfig:
    """A checked sweep: the folder that holds those of all cells, the cells, and what executes them."""

    name: str
    folder: Path
    cells: tuple[Cell, ...]
    asked: Sweep


@dataclass(frozen=True, slots=True)
class _Asked:
    """A cell before it is named: labels per axis, and (dotted key, value, where that was written)."""

    labels: dict[str, str]
    values: list[tuple[str, Any, tuple[str | int, ...]]]


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a YAML file with a ``sweep`` block.

    Args:
        path: the file, UTF-8.
        overrides: ``block.key=value`` strings, for all cells; ``sweep.KEY=[...]`` replaces an axis.

    Raises:
        ConfigError: with every problem of the file and of all cells, each with its line, its path, and the names of
            the cells that have it, if not all have.
    """
    found = load_any(path, overrides)
    if isinstance(found, RunConfig):
        raise ConfigError(str(path), ["there is no 'sweep' block: this is one run, which load_config takes."])
    return found


def load_any(path: Path, overrides: Sequence[str] = ()) -> RunConfig | SweepConfig:
    """Read a YAML file that asks for one run (`load_config`) or for several (`load_sweep`)."""
    document = read_document(path, overrides)
    if SWEEP not in document.data:
        return build(document, str(path))
    sweep, problems = _read_sweep(document)
    if problems:
        raise ConfigError(str(path), problem_lines(document, problems))
    asked = _asked_cells(sweep)
    if len(asked) > MOST_CELLS:
        raise ConfigError(str(path), [f"sweep: asks for {len(asked):,} cells; {MOST_CELLS:,} is the most."])
    return _build_cells(document, sweep, asked, str(path))


def _read_sweep(document: Document) -> tuple[Sweep, list[Problem]]:
    """Check the block by itself; a wrong one is an empty one, with its problems."""
    try:
        sweep = Sweep.model_validate(document.data[SWEEP])
    except ValidationError as error:
        return Sweep.model_construct(), [Problem((SWEEP, *item["loc"]), explain(item)) for item in error.errors()]
    problems = list(sweep_problems(sweep))
    swept = [key for one in _asked_cells(sweep)[:MOST_CELLS] for key, _, _ in one.values] if not problems else []
    given = [path for path, place in document.places.items() if place.order >= AFTER_FILE and path[0] != SWEEP]
    for path in given:
        if any(overlap(path, tuple(key.split("."))) for key in swept):
            message = (
                f"is set by the cells of the sweep, which would replace it. Set {SWEEP}.{show(path)}=[...] instead"
            )
            problems.append(Problem(path, message))
    return sweep, problems


def _asked_cells(sweep: Sweep) -> list[_Asked]:
    """Every combination, the last axis fastest; then the cells that are named one by one."""
    axes = {name: list(_choices(name, value)) for name, value in sweep.listed.items()}
    found = [
        _Asked(
            {name: one.labels[name] for name, one in zip(axes, chosen, strict=True)},
            [value for one in chosen for value in one.values],
        )
        for chosen in (product(*axes.values()) if axes else ())
    ]
    for i, cell in enumerate(sweep.cells):
        values = [(key, value, (SWEEP, "cells", i, key)) for key, value in cell.items()]
        found.append(_Asked({key: label(value) for key, value in cell.items()}, values))
    return found


def _choices(name: str, value: Any) -> Iterator[_Asked]:
    """What one axis offers."""
    if "." in name:
        for i, one in enumerate(value):
            yield _Asked({name: label(one)}, [(name, one, (SWEEP, name, i))])
        return
    for chosen, settings in value.items():
        yield _Asked({name: label(chosen)}, [(k, v, (SWEEP, name, chosen, k)) for k, v in settings.items()])


def _build_cells(document: Document, sweep: Sweep, asked: Sequence[_Asked], source: str) -> SweepConfig:
    """Make and check every configuration; raises ConfigError with the problems of all of them, each told once."""
    del document.data[SWEEP]
    names = _names(asked)
    folder = _folder(document.data)
    problems: dict[str, list[str]] = {}
    cells: list[Cell] = []
    for name, one in zip(names, asked, strict=True):
        config, found = check_document(_with_values(document, one, folder / name if folder else None))
        for line in found:
            problems.setdefault(line, []).append(name)
        cells.append(Cell(name, one.labels, config))
    twice = [name for name, n in Counter(names).items() if n > 1]
    told = [f"sweep: two cells are the same: {name}. Keep one." for name in twice]
    told += [line if len(of) == len(cells) else f"{in_cells(of)}: {line}" for line, of in problems.items()]
    if told or folder is None:
        raise ConfigError(source, told)
    return SweepConfig(
        _name(document.data), folder, tuple(replace(cell, config=resolve(cell.config)) for cell in cells), sweep
    )


def _with_values(document: Document, asked: _Asked, folder: Path | None) -> Document:
    """The base document with the values of one cell, and its folder."""
    own = Document(copy.deepcopy(document.data), dict(document.places), list(document.problems))
    for key, value, written in asked.values:
        set_key(own, tuple(key.split(".")), copy.deepcopy(value), document.place(written) or Place(0, show(written)))
    if folder is not None:
        own.put(("output", "dir"), str(folder), document.place(("output", "dir")) or Place(0, ""))
    return own


def in_cells(names: Sequence[str]) -> str:
    """Say which cells have a problem."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"cell {names[0]}{more}"


def _folder(data: Mapping[str, Any]) -> Path | None:
    """The base's output folder, read before it is checked; None where that cannot be one."""
    output = data.get("output")
    given = output.get("dir") if isinstance(output, dict) else None
    if given is None and not (output is None or isinstance(output, dict)):
        return None
    if given is not None and not (isinstance(given, str) and given.strip()):
        return None
    return Path(given or f"runs/{_name(data)}").expanduser()


def _name(data: Mapping[str, Any]) -> str:
    experiment = data.get("experiment")
    name = experiment.get("name") if isinstance(experiment, dict) else None
    return name if isinstance(name, str) else "ffnscope_run"


def label(value: Any) -> str:
    """Write a value as a part of a folder's name; it depends on nothing else, so that a sweep can grow."""
    if isinstance(value, list):
        text = "+".join(label(one) for one in value) or "none"
    elif isinstance(value, dict):
        text = "+".join(f"{key}-{label(one)}" for key, one in value.items()) or "none"
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    text = re.sub(r"[^\w.+-]+", "-", text)
    text = (text.strip("-.") if isinstance(value, str) else text) or "none"
    return text if len(text) <= LONGEST_LABEL else f"{text[-LONGEST_LABEL + _HASH + 1 :]}-{_digest(value)}"


def _names(asked: Sequence[_Asked]) -> list[str]:
    """``key=value,key=value``; a key by its last part, where no other key has the same."""
    keys = list(dict.fromkeys(key for one in asked for key in one.labels))
    ends = Counter(key.rsplit(".", 1)[-1] for key in keys)
    short = {key: end if ends[end := key.rsplit(".", 1)[-1]] == 1 else key for key in keys}
    found = [",".join(f"{short[key]}={text}" for key, text in one.labels.items()) for one in asked]
    alike = Counter(name.casefold() for name in found)
    named: list[str] = []
    for name, one in zip(found, asked, strict=True):
        if alike[name.casefold()] > 1 or len(name) > LONGEST_NAME:
            name = f"{name[:LONGEST_NAME]}-{_digest(sorted((key, value) for key, value, _ in one.values))}"
        named.append(name)
    return named


def _digest(value: Any) -> str:
    return hash_json(value)[:_HASH]
