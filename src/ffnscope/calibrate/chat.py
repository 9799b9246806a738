"""Conversations as rows of tokens, and which of these tokens the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from ffnscope.calibrate.documents import Chat
from ffnscope.calibrate.tokens import Row, Tokenizer, special_id
from ffnscope.errors import TextError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_rows(chats: Iterable[Chat], tokenizer: Tokenizer, length: int, answers_only: bool) -> Iterator[Row]:
    """Yield one row per chat, cut at ``length`` tokens, made by the tokenizer's chat template.

    With ``answers_only`` the targets are the assistant's tokens (see `answer_mask`), else every token but the first.

    Raises:
        TextError: the tokenizer has no chat template, or the template refuses a chat or rewrites its earlier turns.
    """
    try:
        template = tokenizer.get_chat_template()
    except (ValueError, AttributeError) as error:
        raise TextError(
            "chats need a tokenizer with a chat template; this one has none. Use the instruction-tuned model's "
            "tokenizer, or a text without messages."
        ) from error
    marked = bool(_GENERATION.search(template))
    for index, chat in enumerate(chats):
        if not answers_only:
            ids, targets = _ids(tokenizer, chat, index), None
        elif marked:
            found = _render(tokenizer, chat, index, return_assistant_tokens_mask=True)
            ids, targets = list(found["input_ids"]), [bool(m) for m in found["assistant_masks"]]
        else:
            ids = _ids(tokenizer, chat, index)
            targets = answer_mask(tokenizer, chat, ids, index)
        yield Row(ids[:length], index, None if targets is None else targets[:length])


def answer_mask(tokenizer: Tokenizer, chat: Chat, ids: list[int], index: int = 0) -> list[bool]:
    """Mark the assistant's tokens by the difference of two prefixes, for templates without generation markers.

    An answer is what the template adds to the earlier turns and the generation prompt, up to its last end-of-sequence
    token (line breaks after that are the template's, not the model's). Both prefixes must be prefixes of ``ids`` token
    by token. An assistant's message that opens the chat answers nothing and is not marked.

    Args:
        tokenizer: has a chat template.
        chat: messages.
        ids: tokens of the whole chat.
        index: number of the chat, for messages.

    Returns:
        One bool per token of ``ids``.

    Raises:
        TextError: a prefix is not one, because the template rewrites earlier turns.
    """
    mask = [False] * len(ids)
    for turn, message in enumerate(chat):
        if message["role"] != "assistant" or turn == 0:
            continue
        before = _ids(tokenizer, chat[:turn], index, add_generation_prompt=True)
        after = _ids(tokenizer, chat[: turn + 1], index)
        if ids[: len(before)] != before or ids[: len(after)] != after or len(after) < len(before):
            raise TextError(
                f"chat {index}: the chat template renders message {turn} differently when more messages follow, so the "
                "answer's tokens cannot be told apart. Use a template with {% generation %} markers, chats with one "
                "answer, or answers_only=False."
            )
        for position in range(len(before), _end(after, len(before), special_id(tokenizer, "eos"))):
            mask[position] = True
    return mask


def _end(ids: list[int], start: int, eos: int | None) -> int:
    """Position after the last ``eos`` at or after ``start``, or the end where there is none."""
    return next((k + 1 for k in range(len(ids) - 1, start - 1, -1) if ids[k] == eos), len(ids))


def _ids(tokenizer: Tokenizer, chat: Chat, index: int, **options: Any) -> list[int]:
    return list(_render(tokenizer, chat, index, **options)["input_ids"])


def _render(tokenizer: Tokenizer, chat: Chat, index: int, **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, tokenizer_kwargs={"verbose": False}, **options
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in chat)
        raise TextError(f"chat {index} (roles {roles}) is refused by the chat template: {error}") from error
