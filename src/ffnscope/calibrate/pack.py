"""From documents to windows: contiguous blocks, one row per line, or chats."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch

from ffnscope.calibrate.chat import chat_rows
from ffnscope.calibrate.documents import Chat, Document
from ffnscope.calibrate.tokens import Row, Tokenizer, encode, leading_bos, pieces, special_id
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import TextError, UsageError, unknown_name

Mode: TypeAlias = Literal["contiguous", "lines", "chat"]

MODES = ("contiguous", "lines", "chat")

POOL_TOKENS = 2**21
"""Windows are chosen among those of this many tokens of a longer text, or four times what was asked for if more."""

_UNITS = {"contiguous": "contiguous windows", "lines": "lines", "chat": "chats"}


@dataclass(frozen=True, slots=True)
class Cut:
    """How documents are cut: the arguments of `make_windows`, the text in words, and how many windows are enough."""

    n: int | None
    length: int
    mode: Mode = "contiguous"
    seed: int = 0
    answers_only: bool = False
    source: str = "text"
    least: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown_name("mode of windows", self.mode, MODES)
        if self.n is not None and self.n < 1:
            raise UsageError(f"n must be at least 1 window, or None for all; got {self.n}.")
        if self.length < 2:
            raise UsageError(
                f"length must be at least 2 tokens, one to predict from and one to predict; got {self.length}."
            )


def make_windows(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    n: int | None,
    length: int,
    mode: Mode = "contiguous",
    seed: int = 0,
    answers_only: bool = False,
) -> Windows:
    """Cut documents into token windows and choose ``n`` of them.

    ``contiguous``: each document is tokenised alone, without special tokens and ending in exactly one blank line; all
    are put end to end and cut into blocks of ``length`` tokens without padding. Where the tokenizer adds a
    beginning-of-sequence token by default, each block starts with one, which counts in ``length``. No other special
    token is put between documents, so every model reads the same text. The unfinished block at the end is dropped.

    ``lines``: one row per document, with the special tokens that the tokenizer adds by default, cut at ``length`` and
    padded on the right. Padding is known by position: an end-of-sequence token of the text stays valid where it is also
    the padding token. Rows of less than two tokens predict nothing and are left out.

    ``chat``: one row per chat by the tokenizer's chat template, cut and padded in the same way. Chats take this mode
    whatever is asked.

    The choice is a random sample without replacement, in the order of the text; it depends on ``seed`` only. Of a text
    longer than `POOL_TOKENS` tokens (or 4 ``n`` ``length``, if more) the rest is not read, unless ``n`` is None.

    Args:
        documents: texts, or chats.
        tokenizer: of the model that will read the windows.
        n: number of windows; None: all.
        length: tokens per window (the most, in modes lines and chat).
        mode: see above.
        seed: chooses the windows.
        answers_only: count only the predictions of the assistant's tokens; for chats.

    Returns:
        Windows [n, T], T = ``length`` or, with padding, the longest row.

    Raises:
        UsageError: an argument has an impossible value.
        TextError: empty text, fewer than ``n`` windows, texts and chats mixed, or no chat template.
    """
    return cut_windows(documents, tokenizer, Cut(n, length, mode, seed, answers_only))


def cut_windows(documents: Iterable[Document], tokenizer: Tokenizer, cut: Cut) -> Windows:
    """Do what `make_windows` says."""
    stream = iter(documents)
    first = next(stream, None)
    if first is None:
        raise TextError(f"{cut.source} holds no document.")
    mode: Mode = cut.mode if isinstance(first, str) else "chat"
    if isinstance(first, str) and (mode == "chat" or cut.answers_only):
        asked = "mode 'chat'" if mode == "chat" else "answers_only"
        raise TextError(f"{cut.source} holds texts; {asked} needs chats (rows with 'messages').")
    alike = _alike(first, stream, cut.source)
    bos = leading_bos(tokenizer) if mode == "contiguous" else []
    if mode == "contiguous":
        rows = contiguous_rows(cast(Iterator[str], alike), tokenizer, cut.length, bos)
    elif mode == "lines":
        rows = line_rows(cast(Iterator[str], alike), tokenizer, cut.length)
    else:
        rows = chat_rows(cast(Iterator[Chat], alike), tokenizer, cut.length, cut.answers_only)
    pool, whole = _pool(rows, cut, cut.length if mode == "contiguous" else 2)
    chosen = pool if cut.n is None else [pool[i] for i in choose(len(pool), min(cut.n, len(pool)), cut.seed)]
    notes = [
        f"{cut.source}: {len(chosen):,} of {'' if whole else 'the first '}{len(pool):,} {_UNITS[mode]}"
        f" of {'' if mode == 'contiguous' else 'at most '}{cut.length:,} tokens",
        f"seed {cut.seed}" if cut.n is not None else "",
        "BOS first" if bos else "",
        "loss on answers only" if cut.answers_only else "",
    ]
    return _stack(chosen, tokenizer, ", ".join(filter(None, notes)))


def contiguous_rows(texts: Iterable[str], tokenizer: Tokenizer, length: int, bos: Sequence[int] = ()) -> Iterator[Row]:
    """Yield blocks of exactly ``length`` tokens, each starting with ``bos``; the unfinished last block is shorter."""
    body = length - len(bos)
    buffer: list[int] = []
    owners: list[int] = []
    for index, text in enumerate(texts):
        if not text.strip():
            continue
        for piece in pieces(text.rstrip("\n") + "\n\n"):
            ids = encode(tokenizer, piece)
            buffer += ids
            owners += [index] * len(ids)
            full = len(buffer) // body * body
            for start in range(0, full, body):
                yield Row([*bos, *buffer[start : start + body]], owners[start])
            del buffer[:full], owners[:full]
    if buffer:
        yield Row([*bos, *buffer], owners[0])


def line_rows(texts: Iterable[str], tokenizer: Tokenizer, length: int) -> Iterator[Row]:
    """Yield one row per text that is not blank, with the tokenizer's default special tokens, cut at ``length``."""
    for index, text in enumerate(texts):
        if text.strip():
            yield Row(encode(tokenizer, text, special=True)[:length], index)


def choose(total: int, n: int, seed: int) -> list[int]:
    """Choose ``n`` of ``total`` indices, ascending: those whose hash with the seed is smallest.

    A smaller ``n`` chooses a part of what a larger one chooses, on every platform and in every version.
    """

    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=16).digest()

    return sorted(sorted(range(total), key=rank)[:n])


def _alike(first: Document, others: Iterable[Document], source: str) -> Iterator[Document]:
    """Yield all documents; raise at one that is a chat among texts or a text among chats."""
    yield first
    for index, document in enumerate(others, 1):
        if isinstance(document, str) != isinstance(first, str):
            raise TextError(f"{source} mixes texts and chats (document {index}); split them into two files.")
        yield document


def _pool(rows: Iterable[Row], cut: Cut, shortest: int) -> tuple[list[Row], bool]:
    """Collect rows of at least ``shortest`` tokens that predict something; tell whether that is the whole text."""
    limit = None if cut.n is None else max(POOL_TOKENS, 4 * cut.n * cut.length)
    pool: list[Row] = []
    tokens, last, whole = 0, -1, True
    for row in rows:
        if limit is not None and tokens >= limit:
            whole = False
            break
        tokens, last = tokens + len(row.ids), row.document
        if len(row.ids) >= shortest and row.predicts:
            pool.append(row)
    if not tokens:
        raise TextError(f"{cut.source} holds no text: every document is empty.")
    needed = cut.n if cut.n is None or cut.least is None else min(cut.n, cut.least)
    if len(pool) < (needed or 1):
        subject = "it" if whole else "its beginning"
        raise TextError(
            f"{needed or 1:,} windows of {cut.length:,} tokens were asked of {cut.source}; {subject} has "
            f"{len(pool):,} ({tokens:,} tokens in {last + 1:,} documents). Lower the number or the length, or give "
            "more text."
        )
    return pool, whole


def _stack(rows: Sequence[Row], tokenizer: Tokenizer, source: str) -> Windows:
    """Pad rows on the right to the longest and stack them."""
    longest = max(len(row.ids) for row in rows)
    pad = next((k for k in (special_id(tokenizer, "pad"), special_id(tokenizer, "eos")) if k is not None), 0)
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    valid = torch.zeros_like(ids, dtype=torch.bool)
    targets = torch.zeros_like(valid)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids, dtype=torch.int64)
        valid[i, : len(row.ids)] = True
        targets[i, : len(row.ids)] = row.targets
    return Windows(ids, valid, targets, torch.tensor([row.document for row in rows]), source)
