"""The part of a GGUF file that holds a byte-level BPE tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ffnscope.errors import NotAvailableError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_CASES + "{1,3}" + _REST: "llama-bpe", _CASES + _REST: "qwen2"}
"""Regular expression that splits a text before BPE -> name of it in this format."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens in the order of their ids, their kinds, merges, the name of the splitting rule, and what is special."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    rule: str
    special: dict[str, int]
    add_bos: bool
    chat_template: str | None

    def write(self, writer: Any) -> None:
        """Add all of it to a ``GGUFWriter``."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        writer.add_add_bos_token(self.add_bos)
        for name, index in self.special.items():
            getattr(writer, f"add_{name}_token_id")(index)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Read a fast tokenizer of `transformers`; ``size`` is the number of rows of the embedding.

    Raises:
        NotAvailableError: not a byte-level BPE tokenizer, or one that splits texts by a rule that is not known here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    rule = _rule(found.get("pre_tokenizer")) if found.get("model", {}).get("type") == "BPE" else None
    if rule is None or found.get("normalizer") is not None:
        raise NotAvailableError(
            f"the format 'gguf' is available for byte-level BPE tokenizers that split like GPT-2, SmolLM, Llama 3 or "
            f"Qwen 2; {type(tokenizer).__name__} is another. Save in the format 'transformers' and convert that with a "
            "converter of llama.cpp."
        )
    names = {index: token for token, index in found["model"]["vocab"].items()}
    kinds = dict.fromkeys(names, NORMAL)
    for token in found["added_tokens"]:
        names[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    first = tokenizer("a")["input_ids"][0]
    return Vocabulary(
        tokens=[names.get(i, f"[PAD{i}]") for i in range(size)],
        kinds=[kinds.get(i, UNUSED) for i in range(size)],
        merges=[m if isinstance(m, str) else " ".join(m) for m in found["model"]["merges"]],
        rule=rule,
        special={name: index for name, index in special.items() if index is not None},
        add_bos=first == special["bos"] is not None,
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _rule(split: dict[str, Any] | None) -> str | None:
    """Name of the rule by which a tokenizer splits texts, or None when it is not one of those known here."""
    parts: list[dict[str, Any]] = [] if split is None else split.get("pretokenizers", [split])
    kinds = [part["type"] for part in parts]
    if not kinds or kinds[-1] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return None
    if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not parts[1]["use_regex"]:
        return SPLITS.get(parts[0]["pattern"].get("Regex", ""))
    return None
