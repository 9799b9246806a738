"""The door to the YAML: read, override, check everything, and report all problems of a file together."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ffnscope.errors import ConfigError
from ffnscope.run.checks import check_all
from ffnscope.run.document import (
    Document,
    DocumentError,
    KeyPath,
    Place,
    Problem,
    parse_document,
    parse_value,
    show,
    write_yaml,
)
from ffnscope.run.evaluation_block import ExtraText
from ffnscope.run.explain import ALIASES, explain
from ffnscope.run.schema import RunConfig

AFTER_FILE = 1_000_000_000
"""Order of the first override: they come after every line."""
SWEEP = "sweep"
"""Block of a file that asks for several runs."""
_STAND_IN = "stand-in"


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file.

    Args:
        path: the file, UTF-8. ``${NAME}`` in it stays as it is.
        overrides: ``block.key=value`` strings that replace keys of the file; values are read as YAML.

    Returns:
        The resolved configuration: what depends on other keys (seeds, held-out split, output folder) is filled in.

    Raises:
        ConfigError: with every problem of the file and of the overrides, each with its line (or ``--set``) and path.
    """
    return build(read_document(path, overrides), str(path))


def config_from_dict(d: Mapping[str, Any], source: str = "<dict>") -> RunConfig:
    """Check a nested mapping as `load_config` checks a file; ``source`` names it in the ConfigError."""
    return build(Document(copy.deepcopy(dict(d))), source)


def read_document(path: Path, overrides: Sequence[str] = ()) -> Document:
    """Read a YAML file and set the overrides in it; raises ConfigError when it is no mapping at all."""
    try:
        document = parse_document(_read(path))
    except DocumentError as error:
        raise ConfigError(str(path), [str(error)]) from error
    for i, text in enumerate(overrides):
        _override(document, text, AFTER_FILE + i)
    return document


def dump_config(config: RunConfig) -> str:
    """Write a configuration as YAML that `load_config` reads back to an equal one."""
    return write_yaml(config.model_dump())


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DocumentError("the file does not exist") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DocumentError(f"line {line}: the file is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise DocumentError(f"the file cannot be read: {error.strerror or error}") from error


def _override(document: Document, text: str, order: int) -> None:
    dotted, equals, value = text.partition("=")
    path = tuple(dotted.strip().split("."))
    if path[0] == SWEEP and len(path) > 2:
        path = (SWEEP, ".".join(path[1:]))  # its keys are themselves dotted
    place = Place(order, f"--set {dotted.strip()}")
    if not equals or not all(path):
        document.problems.append(Problem((), f"expected block.key=value; got {text!r}", Place(order, "--set")))
        return
    try:
        parsed = parse_value(value)
    except DocumentError as error:
        document.problems.append(Problem(path, str(error), place))
        return
    set_key(document, path, parsed, place)


def set_key(document: Document, path: tuple[str, ...], value: Any, place: Place) -> None:
    """Set a key of the document, under whichever of its names it was given before."""
    for alias, name in ALIASES.items():
        if path in (alias, (*alias[:-1], name)):
            document.drop(alias)
            document.drop((*alias[:-1], name))
    document.put(path, value, place)


def build(document: Document, source: str) -> RunConfig:
    """Check a document; raises ConfigError with all its problems."""
    config, problems = check_document(document)
    if problems:
        raise ConfigError(source, problems)
    return resolve(config)


def check_document(document: Document) -> tuple[RunConfig, list[str]]:
    """Check a document, which is changed; returns what is left without the faults, not resolved, and the problems."""
    if SWEEP in document.data:
        several = "asks for several runs: `ffnscope run` and `ffnscope.run.load_sweep` take it, this place one run only"
        document.problems.append(Problem((SWEEP,), several, document.place((SWEEP,))))
        del document.data[SWEEP]
    renamed = _rename_aliases(document)
    config, problems = _validate(document.data)
    problems = [*document.problems, *problems]
    wrong = {problem.path for problem in problems if problem.path}
    for finding in check_all(config):
        if not any(overlap(path, bad) for path in finding.reads for bad in wrong):
            problems.append(finding.problem)
    return config, problem_lines(document, problems, renamed)


def _rename_aliases(document: Document) -> dict[KeyPath, KeyPath]:
    """Move second names to the schema's own; returns schema path -> path as written."""
    renamed: dict[KeyPath, KeyPath] = {}
    for alias, name in ALIASES.items():
        own = (*alias[:-1], name)
        block = document.data.get(alias[0])
        if not isinstance(block, dict) or alias[-1] not in block:
            continue
        value = block.pop(alias[-1])
        if name in block:
            same = f"is another name of {show(own)}, and both are given. Keep one"
            document.problems.append(Problem(alias, same))
            continue
        block[name] = value
        renamed[own] = alias
    return renamed


def _validate(data: dict[str, Any]) -> tuple[RunConfig, list[Problem]]:
    """Check block by block; what is wrong is reported, then taken out, so that the rest can be checked together."""
    data.setdefault("model", {})
    problems: list[Problem] = []
    while True:
        try:
            return RunConfig.model_validate(data), problems
        except ValidationError as error:
            found = [Problem(_in_data(data, item["loc"]), explain(item)) for item in error.errors()]
            problems += found
            for path in dict.fromkeys([_innermost(data, problem.path) for problem in found]):
                _take_out(data, path)


def _in_data(data: Any, loc: tuple[str | int, ...]) -> KeyPath:
    """Cut what pydantic adds to a place (the type that it tried) and the user never wrote."""
    path: list[str | int] = []
    for n, key in enumerate(loc, 1):
        rows: Any = dict(enumerate(data)) if isinstance(data, (list, tuple)) else data
        if isinstance(rows, dict) and key in rows:
            data = rows[key]
        elif n < len(loc) or not (data is None or isinstance(data, dict)):
            continue
        path.append(key)
    return tuple(path)


def _innermost(data: dict[str, Any], path: KeyPath) -> KeyPath:
    """Cut a path to the innermost key that is there; a list counts as a whole, so that its indices stay true."""
    inner: Any = data
    for n, key in enumerate(path):
        if not isinstance(inner, dict) or key not in inner:
            return path[:n] or path
        inner = inner[key]
    return path


def _take_out(data: dict[str, Any], path: KeyPath) -> None:
    """Remove a key; without the model's name nothing could be checked, so it gets a stand-in."""
    if path[0] == "model" and path[1:] in {(), ("model_id",)}:
        block = data["model"]
        data["model"] = {**(block if isinstance(block, dict) else {}), "model_id": _STAND_IN}
        return
    block: dict[Any, Any] = data
    for key, after in zip(path, [*path[1:], None], strict=True):
        inner = block.get(key)
        if not isinstance(inner, dict) or after not in inner:
            block.pop(key, None)
            return
        block = inner


def overlap(a: KeyPath, b: KeyPath) -> bool:
    """Whether one path is, or lies in, the other."""
    n = min(len(a), len(b))
    return a[:n] == b[:n]


def problem_lines(
    document: Document, problems: Sequence[Problem], renamed: Mapping[KeyPath, KeyPath] | None = None
) -> list[str]:
    """Write every problem with its place, in the order of the file; ``renamed``: schema path -> path as written."""
    rows: list[tuple[int, str]] = []
    for problem in problems:
        path = problem.path
        for own, written in (renamed or {}).items():
            if path[: len(own)] == own:
                path = (*written, *path[len(own) :])
        place = problem.place or document.place(path)
        parts = [place.words if place else "", show(path), problem.message]
        rows.append((place.order if place else 0, ": ".join(part for part in parts if part).removesuffix(".") + "."))
    return list(dict.fromkeys(text.replace("?.", "?") for _, text in sorted(rows, key=lambda row: row[0])))


def resolve(config: RunConfig) -> RunConfig:
    """Fill in every key that the configuration leaves to another key; a second time changes nothing.

    What it leaves to the widths of the model stays null: see `ffnscope.run.windows.sized`.
    """
    held_out, *extra = config.evaluation_texts
    supernode, scar = config.supernode, config.metrics.scar
    fraction = 0.01 if supernode.core_fraction is None and supernode.top_k is None else supernode.core_fraction
    text = {key: getattr(held_out, key) for key in type(held_out).model_fields}
    backward = None if config.grows and config.scar_num_samples == config.num_samples else config.scar_num_samples
    lengths = {"num_samples": backward, "max_length": config.scar_max_length}
    size = {"num_samples": None if config.grows else config.num_samples, "max_length": config.max_length}
    blocks: dict[str, Any] = {
        "dataset": {
            "split": config.calibration_text.split,
            "mix": tuple(ExtraText(**source.model_dump()) for source in config.mixed_texts),
        },
        "calibration": {"seed": config.seed, **size},
        "metrics": {"scar": scar.model_copy(update=lengths)},
        "supernode": {"core_fraction": fraction},
        "evaluation": {
            **text,
            "max_length": config.evaluation_max_length,
            "extra": tuple(ExtraText(**source.model_dump()) for source in extra),
        },
        "contextual": {"second": config.contextual_text or config.contextual.second},
        "output": {"dir": config.output.dir or str(config.output_dir)},
    }
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=new) for name, new in blocks.items()}
    )
