"""Downstream tasks from a user's own file: what its rows look like, checked before lm-eval sees them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from ffnscope.errors import TextError

SUFFIXES = (".json", ".jsonl")
FORMS = (
    "'query', 'choices' (two texts or more) and 'answer' (the index of the right one); "
    "'query' and 'target' (the right continuation); or 'text'"
)


def task_config(path: Path) -> dict[str, Any]:
    """Configuration by which lm-eval reads a file of tasks; the task is called like the file.

    A .jsonl file has one row per line, a .json file a list of rows. All rows have the same form:

    * ``query``, ``choices``, ``answer`` (an index from 0): the choice that is most likely after the query. Metrics
      ``acc``, and ``acc_norm`` with log-likelihoods divided by the choices' lengths in characters.
    * ``query``, ``target``: whether greedy decoding gives the target (``acc``), and its ``perplexity``.
    * ``text``: ``word_perplexity``, ``byte_perplexity`` and ``bits_per_byte`` of whole texts.

    Raises:
        TextError: the file is missing, damaged or empty, or a row has another form.
    """
    rows = list(_rows(path))
    if not rows:
        raise TextError(f"{path} holds no row; expected rows with {FORMS}.")
    forms = {_form(place, row) for place, row in rows}
    if len(forms) > 1:
        raise TextError(f"{path} mixes rows of {len(forms)} forms; expected one of them: {FORMS}.")
    return {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        **_READ[forms.pop()],
    }


def _metrics(*names: str, aggregation: str = "mean", better: bool = True) -> list[dict[str, Any]]:
    return [{"metric": n, "aggregation": aggregation, "higher_is_better": better} for n in names]


def _per_text(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "bits_per_byte" if name == "bits_per_byte" else "weighted_perplexity"}


_READ: Mapping[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": _metrics("acc", "acc_norm"),
    },
    "target": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{target}}",
        "metric_list": [
            *_metrics("acc"),
            *_metrics("perplexity", aggregation="perplexity", better=False),
        ],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {**_per_text(n), "higher_is_better": False} for n in ("word_perplexity", "byte_perplexity", "bits_per_byte")
        ],
    },
}


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each row is, and the row."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"the task file {path} cannot be read: {error}.") from error
    if path.suffix == ".json":
        found = _parsed(str(path), text)
        if not isinstance(found, list):
            raise TextError(f"{path}: expected a list of rows; got {type(found).__name__}.")
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(cast("list[Any]", found), start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut texts at U+2028 and the like
        if line.strip():
            place = f"{path}, line {number}"
            yield place, _parsed(place, line)


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise TextError(f"{place} is not JSON: {error}.") from error


def _form(place: str, row: Any) -> str:
    """Which form a row has."""
    fields: dict[str, Any] = cast("dict[str, Any]", row) if isinstance(row, dict) else {}
    if _is_text(fields.get("text")) and not fields.keys() & {"query", "choices", "target"}:
        return "text"
    if _is_text(fields.get("query")):
        choices: Any = fields.get("choices")
        if isinstance(choices, list) and len(cast("list[Any]", choices)) > 1:
            texts, answer = cast("list[Any]", choices), fields.get("answer")
            if all(_is_text(c) for c in texts) and type(answer) is int and 0 <= answer < len(texts):
                return "choices"
            raise TextError(
                f"{place}: 'choices' must be texts and 'answer' the index of one of them, 0 to {len(texts) - 1}; got "
                f"answer {answer!r}."
            )
        if _is_text(fields.get("target")) and "choices" not in fields:
            return "target"
    found = ", ".join(map(repr, fields)) or type(row).__name__
    raise TextError(f"{place}: expected {FORMS}; found {found}.")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
