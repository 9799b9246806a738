"""What downstream tasks would take: their questions are read, and some of them are tokenised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ffnscope.evaluate.task_tokens import TaskTokens, task_tokens
from ffnscope.evaluate.tasks import TaskSet, load_tasks
from ffnscope.run.bounds import Load
from ffnscope.run.lines import Line
from ffnscope.run.schema import RunConfig

TOKENS_OF_ONE_STEP = 32
"""A step of generation reads every weight for a few tokens: it takes about as long as a pass over this many tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class AskedTasks:
    """Downstream tasks, and how much text they are."""

    tasks: TaskSet
    tokens: TaskTokens


def tasks_of(config: RunConfig, tokenizer: Any) -> AskedTasks | None:
    """The tasks of a run, None where it has none; raises as `load_tasks`."""
    if config.task_options is None:
        return None
    tasks = load_tasks(config.task_options)
    return AskedTasks(tasks, task_tokens(tasks, tokenizer))


def tasks_lines(asked: AskedTasks | None, n_models: int, speed: float) -> list[Line]:
    """Tell the tasks of some models; ``speed`` in seconds per token of a forward."""
    if asked is None:
        return []
    found = asked.tokens
    what = " and ".join(f"{n:,} questions of {name}" for name, n in asked.tasks.n_questions.items())
    size = asked.tasks.options.batch_size
    steps = found.generated / size
    told = f"{n_models} models x {what}, about {found.read:,} tokens"
    told += f" and up to {found.generated:,} generated" if found.generated else ""
    reads = n_models * math.ceil(found.requests / size + steps)  # every forward of a streamed model is one
    return [Line("tasks", told, n_models * (found.read + steps * TOKENS_OF_ONE_STEP) * speed, reads)]


def load_of_tasks(asked: AskedTasks | None) -> Load:
    """Requests in batches, each as long as the longest that was counted."""
    if asked is None:
        return Load()
    return Load(asked.tokens.read, asked.tokens.longest, asked.tasks.options.batch_size)
