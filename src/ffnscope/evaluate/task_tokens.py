"""How much text downstream tasks are, from the requests of their first questions; no model is run."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ffnscope.evaluate.tasks import TaskSet

QUESTIONS = 32
"""Of each task whose requests are made and counted; the others count as these do on average."""
GENERATED = 256
"""Tokens that lm-eval lets a model generate where a task says nothing."""


@dataclass(frozen=True, slots=True)
class TaskTokens:
    """Tokens of all questions.

    Attributes:
        requests: each of which is run forward.
        read: forward, contexts with their continuations.
        generated: at most, one forward each.
        longest: of a request.
    """

    requests: int = 0
    read: int = 0
    generated: int = 0
    longest: int = 0


def task_tokens(tasks: TaskSet, tokenizer: Any) -> TaskTokens:
    """Count the tokens of all tasks, the limit and the examples applied."""
    requests = read = generated = 0.0
    longest = 0
    for task in (task for items in tasks.loaded.values() for task in items["tasks"].values()):
        n = min(len(task.eval_docs), tasks.options.limit or len(task.eval_docs))
        if not n:
            continue
        some = min(n, QUESTIONS)
        with tasks.prepared([task]), contextlib.redirect_stderr(io.StringIO()):  # a bar for each task
            task.build_all_requests(limit=some)
        sizes = [_size(one.args, tokenizer) for one in task.instances]
        requests += len(sizes) * n / some
        read += sum(size for size, _ in sizes) * n / some
        generated += sum(more for _, more in sizes) * n / some
        longest = max(longest, *(size for size, _ in sizes))
    return TaskTokens(round(requests), round(read), round(generated), longest)


def _size(request: Iterable[Any], tokenizer: Any) -> tuple[int, int]:
    """Tokens of the texts of a request, and those that it lets a model generate."""
    parts = list(request)
    read = sum(len(tokenizer(part)["input_ids"]) for part in parts if isinstance(part, str))
    given: list[Mapping[str, Any]] = [part for part in parts if isinstance(part, Mapping)]
    return read, sum(int(one.get("max_gen_toks", GENERATED)) for one in given)
