"""Documents, and how rows and local files become documents."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ffnscope.errors import TextError

Chat: TypeAlias = list[dict[str, str]]
"""Messages of one conversation, each with ``role`` and ``content``."""

Document: TypeAlias = str | Chat

Place: TypeAlias = tuple[str, Mapping[str, Any]]
"""Where a row stands, in words, and the row."""

_CHAT_FIELDS = ("messages", "conversations")
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
_HEADING = re.compile(r" = (?!= )(.*[^= ]|[^= ]) = \n?")


def read_text(path: Path) -> str:
    """Read a UTF-8 file; CRLF becomes LF and a byte order mark is dropped.

    Raises:
        TextError: not readable, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_jsonl(path: Path) -> Iterator[Place]:
    """Yield the rows of a ``.jsonl`` file with their line numbers; blank lines are left out.

    Raises:
        TextError: a line is not a JSON object; the message has its number.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TextError(f"{place} is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise TextError(f"{place} is a JSON {type(row).__name__}; expected an object such as {{'text': '...'}}.")
        yield place, row


def documents_of(rows: Iterable[Place], field: str | None) -> Iterator[Document]:
    """Turn rows into documents: strings as they are, lists of messages as chats.

    Args:
        rows: places and rows.
        field: column of the text or of the messages. None: ``text``, else ``messages`` or ``conversations``, else the
            only column of strings; the first row decides.

    Raises:
        TextError: the column is missing, cannot be told, or holds something else.
    """
    column = field
    for place, row in rows:
        column = column or _column(place, row)
        if column not in row:
            raise TextError(f"{place} has no {column!r}; it has {_names(row)}. Name the column with text_field.")
        value = row[column]
        if isinstance(value, str):
            yield _encodable(place, value)
        elif isinstance(value, list):
            yield _chat(place, value)
        else:
            raise TextError(f"{place}: {column!r} is {type(value).__name__}; expected a string or a list of messages.")


def wikitext_articles(lines: Iterable[Document]) -> Iterator[Document]:
    """Join WikiText rows, which are lines, into articles at top-level headings (`` = Title = `` after a blank line).

    A row of several lines is a whole document already and stays alone.
    """
    article: list[str] = []
    blank = True
    for line in lines:
        if not isinstance(line, str) or "\n" in line.rstrip("\n"):
            yield from _joined(article)
            article = []
            yield line
            continue
        if blank and _HEADING.fullmatch(line):
            yield from _joined(article)
            article = []
        article.append(line.rstrip("\n") + "\n")
        blank = not line.strip()
    yield from _joined(article)


def _joined(lines: list[str]) -> Iterator[str]:
    text = "".join(lines)
    if text.strip():
        yield text


def _column(place: str, row: Mapping[str, Any]) -> str:
    for name in ("text", *_CHAT_FIELDS):
        if name in row:
            return name
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if len(strings) == 1:
        return strings[0]
    raise TextError(f"{place} has no column 'text' or 'messages'; it has {_names(row)}. Name one with text_field.")


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "no column"


def _encodable(place: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(
            f"{place} holds half of a surrogate pair at character {error.start}; repair the text."
        ) from error
    return text


def _chat(place: str, messages: list[Any]) -> Chat:
    """Check messages and give them the keys ``role`` and ``content``; ``from`` and ``value`` are understood too."""
    if not messages:
        raise TextError(f"{place}: the list of messages is empty.")
    chat: Chat = []
    for number, message in enumerate(messages):
        get: Callable[[str], Any] = message.get if isinstance(message, Mapping) else lambda _key: None
        role, content = get("role") or get("from"), get("content")
        content = get("value") if content is None else content
        if not isinstance(role, str) or not isinstance(content, str):
            raise TextError(f"{place}: message {number} needs a 'role' and a 'content', both strings.")
        chat.append({"role": _SPEAKERS.get(role, role), "content": _encodable(place, content)})
    return chat
