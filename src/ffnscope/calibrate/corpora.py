"""Texts that every installation has: speeches (shipped), Python's documentation and Python's source."""

from __future__ import annotations

import importlib.resources
import json
import lzma
import os
import platform
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ffnscope.errors import TextError, unknown_name

SPLITS = ("train", "validation", "test")
"""Splits of every shipped corpus, disjoint by document."""

_SHARES = {"train": 0.4, "validation": 0.22, "test": 0.38}
"""Shares of the text in the corpora that come with Python; they are small, so test is nearly as large as train."""

_SOURCE_BYTES = (1_000, 40_000)
"""Smallest and largest source file taken: no stubs, and no file that would be a large share of its split."""

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings"}
"""Folders left out: tests, third parties, what not every Python has, and tables of characters."""


def corpus_names() -> list[str]:
    """Names of the shipped corpora."""
    return list(_CORPORA)


def corpus(name: str, split: str = "train") -> list[tuple[str, str]]:
    """Return the documents of one split of a shipped corpus as (document name, text), always in the same order.

    ``sotu``: State of the Union addresses, in order of time. ``pydoc_topics``: the language reference behind Python's
    ``help()``, by topic. ``stdlib_source``: source files of the standard library between 1 and 40 kB. The last two are
    read from the running Python and change with its version; documents that repeat longer ones are left out.

    Raises:
        UnknownNameError: no such corpus or split.
        TextError: the running Python lacks the text.
    """
    if name not in _CORPORA:
        raise unknown_name("shipped corpus", name, _CORPORA)
    if split not in SPLITS:
        raise unknown_name(f"split of {name}", split, SPLITS)
    found = _CORPORA[name](split)
    if not found:
        raise TextError(f"{name}: this Python installation holds none of the text. Use the corpus 'sotu' instead.")
    return found


def describe_corpus(name: str) -> str:
    """Name of a corpus, with the Python version where the text depends on it."""
    return name if name == "sotu" else f"{name} (Python {platform.python_version()})"


def _sotu(split: str) -> list[tuple[str, str]]:
    file = importlib.resources.files("ffnscope") / "corpora" / "sotu.jsonl.xz"
    lines = lzma.decompress(file.read_bytes()).decode("utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    return [(row["id"], row["text"]) for row in rows if row["split"] == split]


def _pydoc_topics(split: str) -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return _in_split(topics, split)


def _stdlib_source(split: str) -> list[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(_source_files(root))
    return _in_split({path.relative_to(root).as_posix(): _read_source(path) for path in paths}, split)


def _source_files(root: Path) -> Iterator[Path]:
    """Yield the files of the corpus; what the build of Python wrote depends on the machine and is left out."""
    smallest, largest = _SOURCE_BYTES
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in _LEFT_OUT and not name.startswith("config-")]
        for path in (Path(folder, name) for name in files):
            of_build = path.name.startswith("_sysconfigdata") or path.parent.name == "pydoc_data"
            if path.suffix == ".py" and not of_build and smallest <= path.stat().st_size <= largest:
                yield path


def _read_source(path: Path) -> str:
    with tokenize.open(path) as file:
        return file.read()


def _in_split(texts: Mapping[str, str], split: str) -> list[tuple[str, str]]:
    """Documents of one split, by name.

    From the longest to the shortest, each document that does not repeat a longer one goes to the split that is furthest
    behind its share of the characters.
    """
    sizes = dict.fromkeys(_SHARES, 0)
    taken: list[str] = []
    for name in _distinct(texts):
        target = min(_SHARES, key=lambda part: sizes[part] / _SHARES[part])
        sizes[target] += len(texts[name])
        if target == split:
            taken.append(name)
    return [(name, texts[name]) for name in sorted(taken)]


def _distinct(texts: Mapping[str, str]) -> Iterator[str]:
    """Yield names, longest text first, without those of which a quarter or more stands in longer texts.

    The topics of ``help()`` repeat each other's sections, and modules copy each other: no split may have seen another.
    """
    seen: set[str] = set()
    for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):
        lines = [line.strip() for line in texts[name].splitlines() if len(line.strip()) >= 30]
        if lines and 4 * sum(line in seen for line in lines) < len(lines):
            yield name
            seen.update(lines)


_CORPORA: dict[str, Callable[[str], list[tuple[str, str]]]] = {
    "sotu": _sotu,
    "pydoc_topics": _pydoc_topics,
    "stdlib_source": _stdlib_source,
}
