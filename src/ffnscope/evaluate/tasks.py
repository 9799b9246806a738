"""Downstream tasks by lm-eval: the dense model and every plan side by side, with lm-eval's own standard errors.

Tasks are lm-eval's names (tasks, groups, tags), its YAML files, or a user's own .json and .jsonl files (see
`ffnscope.evaluate.task_files`), which need no network.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import random
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffnscope.apply.pruned import Pruned, as_pruned
from ffnscope.errors import NonFiniteError, NotAvailableError, TextError, UsageError
from ffnscope.evaluate.progress import DENSE, check_labels, fingerprint, plan_key
from ffnscope.evaluate.task_files import SUFFIXES, task_config
from ffnscope.evaluate.task_model import reporting_model
from ffnscope.io import SCHEMA, disposable, expect_kind, hash_file, hash_json, read_state, write_state
from ffnscope.types import EvalResult

KIND = "tasks"
OnRequests = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """What to run.

    Attributes:
        names: tasks, groups or tags of lm-eval, or paths of .yaml, .json or .jsonl files.
        num_fewshot: examples before each question; None: what the task says, otherwise none.
        limit: questions per task, the first ones; None: all.
        batch_size: requests per forward pass.
        seed: which examples are shown.

    Raises:
        UsageError: no name, one twice, or a number out of range.
    """

    names: tuple[str, ...]
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 1
    seed: int = 1234

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise UsageError(f"tasks must be one or more distinct names; got {', '.join(self.names) or 'none'}.")
        for name, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} of tasks must be at least {least}; got {value}.")


@dataclass(frozen=True, slots=True, eq=False)
class TaskSet:
    """Tasks that are loaded, with their questions: nothing is left that could be missing.

    Attributes:
        options: what was asked.
        loaded: name as asked -> lm-eval's tasks and groups.
        key: hash of the options, of local files and of the version of lm-eval.
        version: of lm-eval.
    """

    options: TaskOptions
    loaded: Mapping[str, Mapping[str, Any]]
    key: str
    version: str

    @property
    def n_questions(self) -> dict[str, int]:
        """Name as asked -> questions of all its tasks, the limit applied."""
        limit = self.options.limit
        found: dict[str, int] = {}
        for name, items in self.loaded.items():
            sizes = [len(task.eval_docs) for task in items["tasks"].values()]
            found[name] = sum(size if limit is None else min(limit, size) for size in sizes)
        return found

    @contextlib.contextmanager
    def prepared(self, tasks: Iterable[Any]) -> Generator[None]:
        """Within the block, requests of tasks can be made: their examples are chosen by the seed, without advice."""
        with _quiet(), _own_seeds(self.options.seed):
            for task in tasks:
                task.set_fewshot_seed(seed=self.options.seed)
            yield


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One metric of one task for one model.

    Attributes:
        label: name of the plan, or "dense".
        result: the number; ``stderr`` is lm-eval's, ``dataset`` the task, ``n`` its questions.
        num_fewshot: examples that were shown; None for a group of tasks that differ.
        higher_is_better: which way is good; None where lm-eval does not say.
    """

    label: str
    result: EvalResult
    num_fewshot: int | None
    higher_is_better: bool | None

    def as_dict(self) -> dict[str, Any]:
        """Flat row for CSV and JSON."""
        one = self.result
        return {
            "label": self.label,
            "task": one.dataset,
            "metric": one.name,
            "value": one.value,
            "stderr": one.stderr,
            "n": one.n,
            "num_fewshot": self.num_fewshot,
            "higher_is_better": self.higher_is_better,
            "protocol": one.protocol,
        }


def load_tasks(options: TaskOptions) -> TaskSet:
    """Load every task with its questions, so that what is missing shows before anything long starts.

    Raises:
        NotAvailableError: lm-eval is not installed.
        TextError: a task is unknown, its file has another form, or its data cannot be loaded; the message names it.
        UsageError: examples are asked for from a task that is defined without, or two tasks have the same name.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise NotAvailableError(
            "downstream tasks are run by lm-eval, which is not installed: pip install 'ffnscope[eval]'."
        ) from error
    version = str(getattr(lm_eval, "__version__", "unknown"))
    own = [name for name in options.names if Path(name).suffix in SUFFIXES]
    with _quiet():
        manager = TaskManager(include_defaults=len(own) < len(options.names))  # reading all of lm-eval's takes seconds
        loaded = {name: _load(manager, name, options) for name in options.names}
    _check_names(own, loaded)
    files = {name: hash_file(Path(name)) for name in options.names if Path(name).is_file()}
    key = hash_json({**asdict(options), "files": files, "lm_eval": version, "schema": SCHEMA})
    return TaskSet(options, loaded, key, version)


def compare_tasks(
    model: nn.Module,
    tokenizer: Any,
    plans: Mapping[str, Pruned],
    tasks: TaskSet,
    *,
    state: Path | None = None,
    on_requests: OnRequests | None = None,
) -> list[TaskRow]:
    """Run all tasks with the dense model and with every plan (by masking), on the same questions and examples.

    Args:
        model: the dense model, a `transformers` causal LM; bit-identical afterwards.
        tokenizer: its tokenizer.
        plans: label -> plan or reconstruction. "dense" is taken.
        tasks: what `load_tasks` gave.
        state: file with what was measured; written after each task of each model, continued from if it belongs to the
            same model and the same tasks.
        on_requests: called with (requests done, requests in all) of the task that runs.

    Raises:
        UsageError: a plan called "dense", or a plan of another model.
        NonFiniteError: a number is NaN or infinite.
        ArtifactError: ``state`` is damaged or of another kind.
    """
    check_labels(plans)
    done = _State.open(state, fingerprint(model), tasks.key)
    rows: list[TaskRow] = []
    for label, plan in ((DENSE, None), *plans.items()):
        key = DENSE if plan is None else plan_key(plan)
        missing = [name for name in tasks.loaded if not done.has(key, name)]
        with contextlib.nullcontext() if plan is None or not missing else as_pruned(model, plan):
            for name in missing:
                done.put(key, name, _run(model, tokenizer, tasks, name, label, on_requests))
        rows += [_row(label, tasks, value) for name in tasks.loaded for value in done.rows[key][name]]
    return rows


@dataclass(slots=True)
class _State:
    """Numbers so far: key of a model -> name of a task -> its rows."""

    path: Path | None
    of: dict[str, Any]
    rows: dict[str, dict[str, list[dict[str, Any]]]]

    @classmethod
    def open(cls, path: Path | None, model: str, tasks: str) -> _State:
        fresh = cls(path, {"kind": KIND, "schema": SCHEMA, "model": model, "tasks": tasks}, {})
        if path is None or not path.exists():
            return fresh
        with disposable("every task is run anew"):
            value: dict[str, Any] = read_state(path)
            expect_kind(path, value, KIND)
        if all(value.get(name) == found for name, found in fresh.of.items()):
            fresh.rows = value.get("rows", {})
        return fresh

    def has(self, key: str, name: str) -> bool:
        return name in self.rows.get(key, {})

    def put(self, key: str, name: str, rows: list[dict[str, Any]]) -> None:
        self.rows.setdefault(key, {})[name] = rows
        if self.path is not None:
            write_state(self.path, {**self.of, "rows": self.rows})


def _load(manager: Any, name: str, options: TaskOptions) -> dict[str, Any]:
    """Tasks and groups of one name, with the number of examples that was asked for."""
    import yaml

    path = Path(name)
    asked: Any = task_config(path) if path.suffix in SUFFIXES else name
    if asked is name and path.suffix not in (".yaml", ".yml") and name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.task_index, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TextError(
            f"lm-eval has no task {name!r}.{hint} `lm-eval ls tasks` lists its tasks; a path of a .yaml, .json or "
            ".jsonl file works too."
        )
    try:
        found = manager.load([asked])
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        ImportError,
        RuntimeError,
        AttributeError,
        yaml.YAMLError,
    ) as error:
        raise _not_loaded(name, error) from error
    for task in found["tasks"].values():
        own = task.get_config("num_fewshot")
        if own == 0 and options.num_fewshot:
            raise UsageError(
                f"task {task.task_name!r} is defined without examples, and {options.num_fewshot} were asked for "
                "(num_fewshot). Leave them out, or run it by itself."
            )
        task.set_config(key="num_fewshot", value=options.num_fewshot if options.num_fewshot is not None else own or 0)
    return found


def _check_names(own: Sequence[str], loaded: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a user's file that is called like another task: one would hide the other."""
    for path in own:
        name = Path(path).stem
        other = next((n for n, items in loaded.items() if n != path and (name == n or name in items["tasks"])), None)
        if other is not None:
            raise UsageError(f"the tasks {path!r} and {other!r} are both called {name!r}; rename the file.")


def _not_loaded(name: str, error: Exception) -> TextError:
    text = str(error).strip().splitlines()
    reason = text[0].rstrip(".") if text else type(error).__name__
    return TextError(
        f"task {name!r} cannot be loaded: {reason}. Check the network and the name of its data set, or give a local "
        "file (.jsonl with 'query', 'choices' and 'answer')."
    )


def _run(
    model: Any, tokenizer: Any, tasks: TaskSet, name: str, label: str, on_requests: OnRequests | None
) -> list[dict[str, Any]]:
    """Rows of one asked name for the model as it is now."""
    import lm_eval

    evaluate: Any = lm_eval.evaluate
    options, loaded = tasks.options, tasks.loaded[name]
    with tasks.prepared(loaded["tasks"].values()):
        model = reporting_model(model, tokenizer, options.batch_size, on_requests)
        found: Any = evaluate(model, loaded, limit=options.limit, log_samples=False)
    shots, better, counts = found["n-shot"], found["higher_is_better"], found["n-samples"]
    rows: list[dict[str, Any]] = []
    for task, values in found["results"].items():
        inside = _inside(task, found["group_subtasks"])
        n = sum(counts[one]["effective"] for one in inside)
        given = {shots[one] for one in inside}
        fewshot = given.pop() if len(given) == 1 else None
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or isinstance(value, str):
                continue
            if not math.isfinite(value):
                raise NonFiniteError(f"{label}: {metric} of task {task} is {value}; check the model and the plan.")
            stderr = values.get(f"{metric}_stderr,{filtered}")
            rows.append(
                {
                    "task": task,
                    "metric": metric if filtered == "none" else f"{metric} ({filtered})",
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, float) and math.isfinite(stderr) else None,
                    "n": n,
                    "num_fewshot": fewshot,
                    "higher_is_better": (better.get(task) or {}).get(metric),
                }
            )
    return rows


def _inside(task: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group, of groups within it too; a task alone is itself."""
    return [leaf for one in groups[task] for leaf in _inside(one, groups)] if groups.get(task) else [task]


def _row(label: str, tasks: TaskSet, value: Mapping[str, Any]) -> TaskRow:
    asked = tasks.options
    how = f"lm-eval {tasks.version}, limit {asked.limit or 'none'}, batch size {asked.batch_size}"
    unit = "fraction" if value["metric"].startswith(("acc", "exact_match", "f1")) else "1"
    result = EvalResult(
        value["metric"], value["value"], unit, value["stderr"], value["n"], value["task"], how, asked.seed
    )
    return TaskRow(label, result, value["num_fewshot"], value["higher_is_better"])


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without lm-eval's advice for its own command line."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _own_seeds(seed: int) -> Generator[None]:
    """Seed the random generators that tasks may draw from; give them their states back."""
    import numpy as np

    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
