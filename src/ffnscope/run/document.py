"""YAML text -> plain data in which every key remembers its line, with all faults of the text itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

KeyPath = tuple[str | int, ...]
_MAX_NODES = 20_000
_PREFIX = "tag:yaml.org,2002:"
_EXPONENT = r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"


class Place(NamedTuple):
    """Where a value was written; ``order`` sorts problems."""

    order: int
    words: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of a configuration: the key it is about, and what is wrong; ``place`` when it is not the key's own."""

    path: KeyPath
    message: str
    place: Place | None = None


class DocumentError(Exception):
    """The text is no YAML mapping at all, so there is nothing to check further."""


@dataclass(slots=True)
class Document:
    """Nested plain values, the place of every key, and the faults found so far."""

    data: dict[str, Any]
    places: dict[KeyPath, Place] = field(default_factory=dict[KeyPath, Place])
    problems: list[Problem] = field(default_factory=list[Problem])

    def place(self, path: KeyPath) -> Place | None:
        """Place of a key; else of the first key below it (a block that only overrides made), or of the block around."""
        below = [place for key, place in self.places.items() if key[: len(path)] == path]
        if path and path not in self.places and below:
            return min(below)
        return next((self.places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.places), None)

    def put(self, path: tuple[str, ...], value: Any, place: Place) -> None:
        """Set a value, making the blocks on the way; everything below it now belongs to ``place``."""
        block = self.data
        for key in path[:-1]:
            if not isinstance(block.get(key), dict):
                block[key] = {}
            block = block[key]
        block[path[-1]] = value
        self.places = {k: v for k, v in self.places.items() if k[: len(path)] != path}
        self.places[path] = place

    def drop(self, path: tuple[str, ...]) -> None:
        """Forget a key if it is there."""
        block: Any = self.data
        for key in path[:-1]:
            block = block.get(key) if isinstance(block, dict) else None
        if isinstance(block, dict):
            block.pop(path[-1], None)


def show(path: KeyPath) -> str:
    """Write a key path as users do: ``pruning.ratios[1]``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-3 is a number and 2024-01-01 is text."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back unchanged, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _install_resolvers() -> None:
    import re

    for kind in (_Loader, _Dumper):
        kind.add_implicit_resolver(f"{_PREFIX}float", re.compile(_EXPONENT), list("-+.0123456789"))
    _Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rows if tag != f"{_PREFIX}timestamp"]
        for first, rows in _Loader.yaml_implicit_resolvers.items()
    }


_install_resolvers()


def write_yaml(value: Any) -> str:
    """Write plain values as YAML that `parse_document` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse_value(text: str) -> Any:
    """Read one value, as an override gives it; raises DocumentError."""
    reader = _Reader(text)
    value = reader.read()
    if reader.problems:
        raise DocumentError(reader.problems[0].message)
    return value


def parse_document(text: str) -> Document:
    """Read a YAML mapping; raises DocumentError when it is none. Other faults are collected in the document."""
    reader = _Reader(text)
    value = reader.read()
    if value is None:
        raise DocumentError("the file is empty; at least 'model: {model_id: ...}' is needed")
    if not isinstance(value, dict):
        raise DocumentError(f"expected a mapping of blocks (model, calibration, ...); found {describe(value)}")
    return Document(value, reader.places, reader.problems)


def describe(value: Any) -> str:
    """Name a value briefly in an error."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _Reader:
    """Turns the node tree of one text into values; counts nodes, so that nested anchors cannot explode."""

    def __init__(self, text: str):
        self.text = text
        self.places: dict[KeyPath, Place] = {}
        self.problems: list[Problem] = []
        self._nodes = 0
        self._open: list[yaml.Node] = []

    def read(self) -> Any:
        try:
            self._loader = _Loader(self.text)
            node = self._loader.get_single_node()
            return None if node is None else self._value(node, ())
        except yaml.YAMLError as error:
            raise DocumentError(_syntax(error)) from error
        except RecursionError as error:
            raise DocumentError("the YAML is nested too deeply") from error

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._nodes += 1
        if self._nodes > _MAX_NODES:
            raise DocumentError(f"the YAML has more than {_MAX_NODES} values once its anchors are written out")
        if node in self._open:
            self._fault(node, path, "an anchor refers to itself")
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == f"{_PREFIX}map":
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == f"{_PREFIX}seq":
                return self._sequence(node, path)
        finally:
            self._open.pop()
        self._fault(node, path, f"the YAML tag {_short(node.tag)} is not supported; write a plain value")
        return None

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        plain = self._loader.resolve(yaml.ScalarNode, node.value, (True, False))
        if node.tag == f"{_PREFIX}str" or plain in {f"{_PREFIX}value", f"{_PREFIX}merge"}:
            return node.value
        if node.tag != plain:
            self._fault(node, path, f"the YAML tag {_short(node.tag)} is not supported; write a plain value")
            return None
        try:
            return self._loader.construct_object(node)
        except ValueError as error:
            self._fault(node, path, f"cannot be read: {error}")
            return None

    def _sequence(self, node: yaml.SequenceNode, path: KeyPath) -> list[Any]:
        for i, item in enumerate(node.value):
            self.places[(*path, i)] = _place(item)
        return [self._value(item, (*path, i)) for i, item in enumerate(node.value)]

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        first: dict[str, yaml.Node] = {}
        found: dict[str, Any] = {}
        for key_node, value_node, own in self._pairs(node):
            key = self._key(key_node, path)
            if key is None:
                continue
            if key in first:
                if own:
                    self._fault(
                        key_node, (*path, key), f"this key is given twice (first on {_place(first[key]).words})"
                    )
                continue
            first[key] = key_node
            self.places[(*path, key)] = _place(key_node)
            found[key] = self._value(value_node, (*path, key))
        return found

    def _pairs(self, node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node, bool]]:
        """Own pairs first, then those of merge keys (<<), which own pairs override."""
        merge = f"{_PREFIX}merge"
        own = [pair for pair in node.value if pair[0].tag != merge]
        yield from ((key, value, True) for key, value in own)
        if len(own) < len(node.value):
            rest = yaml.MappingNode(node.tag, [p for p in node.value if p[0].tag == merge], node.start_mark)
            self._loader.flatten_mapping(rest)
            yield from ((key, value, False) for key, value in rest.value)

    def _key(self, node: yaml.Node, path: KeyPath) -> str | None:
        value = node.value if isinstance(node, yaml.ScalarNode) and node.tag == f"{_PREFIX}str" else None
        if value is None:
            found = node.value if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            self._fault(node, path, f"a key must be text; got {found} (put it in quotes if it is meant as text)")
        return value

    def _fault(self, node: yaml.Node, path: KeyPath, message: str) -> None:
        self.problems.append(Problem(path, message, _place(node)))


def _place(node: yaml.Node) -> Place:
    line = node.start_mark.line + 1 if node.start_mark else 0
    return Place(line, f"line {line}")


def _short(tag: str) -> str:
    return tag.replace(_PREFIX, "!!")


def _syntax(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        parts = [part for part in (error.context, error.problem) if part]
        hint = "; indent with spaces, not tabs" if "\\t" in (error.problem or "") else ""
        return f"{where}not valid YAML: {', '.join(parts)}{hint}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"not valid YAML: character {error.character!r} at position {error.position} is not allowed"
    return f"not valid YAML: {error}"
