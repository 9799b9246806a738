"""The command eval, and what score, rank and prune share: calibrate and score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ffnscope.analyze.levels import needs_core
from ffnscope.analyze.memory import calibration_bytes
from ffnscope.analyze.question import Question
from ffnscope.apply.folder import sweep
from ffnscope.apply.pruned import Pruned
from ffnscope.calibrate.collect import PassOptions, weights_hash
from ffnscope.calibrate.windows import Windows
from ffnscope.cli import options as opt
from ffnscope.cli.files import Overwrite, check_table, read_plans, tell_changes, working_folder, write_table
from ffnscope.cli.groups import grouped
from ffnscope.cli.passes import calibrate_and_score
from ffnscope.errors import UsageError
from ffnscope.evaluate.compare import EvalRow
from ffnscope.evaluate.tasks import TaskOptions, TaskRow, TaskSet, compare_tasks
from ffnscope.ffn.load import LoadedModel
from ffnscope.ffn.streamed import wait_in
from ffnscope.io import read_state, write_scores, write_stats
from ffnscope.report.tables import print_results, results_rows
from ffnscope.report.task_table import print_tasks
from ffnscope.run.progress import Reporter
from ffnscope.run.steps import announce, compare_with_dense, discard_damaged, open_tasks
from ffnscope.run.windows import describe_windows
from ffnscope.scoring import naming_weights
from ffnscope.types import Scores

OUT = Console()


@dataclass(frozen=True, slots=True)
class TaskChoice:
    """Downstream tasks to run beside the perplexity."""

    task: Annotated[
        list[str] | None, typer.Option("--task", help="lm-eval task, or .yaml, .json or .jsonl file; repeatable.")
    ] = None
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question of a task.")] = None
    limit: Annotated[int | None, typer.Option(help="Questions per task, the first ones.")] = None
    task_batch_size: Annotated[int, typer.Option(help="Requests of a task per forward.")] = 1

    def options(self, seed: int) -> TaskOptions | None:
        """None without a task; raises UsageError for what would do nothing."""
        if self.task:
            return TaskOptions(tuple(self.task), self.num_fewshot, self.limit, self.task_batch_size, seed)
        useless = {"num-fewshot": self.num_fewshot, "limit": self.limit}
        for name in (n for n, value in useless.items() if value is not None):
            raise UsageError(f"--{name} would do nothing without --task. Leave it out, or name a task.")
        return None


UNFINISHED = "score.part"
"""Folder in an output that is not finished: what its passes have found so far."""


@grouped
def eval_command(
    *,
    model: opt.Model,
    plan: Annotated[list[Path] | None, typer.Option(help="Evaluate this plan beside the dense model.")] = None,
    text: opt.TextChoice,
    tasks: TaskChoice,
    out: Annotated[Path | None, typer.Option(help="Also write .json or .csv (tasks: NAME.tasks.json).")] = None,
    loading: opt.Loading,
    overwrite: Overwrite = False,
) -> None:
    """Measure perplexity on held-out text, for plans KL to the dense model and top-1; downstream tasks too.

    With --out, an interrupted call goes on.
    """
    options = tasks.options(text.seed)
    of_tasks = None if out is None or options is None else out.with_suffix(f".tasks{out.suffix}")
    check_table(out, overwrite)
    check_table(of_tasks, overwrite)
    plans = read_plans(plan or ())
    text.check_held_out()
    reporter = Reporter()
    chosen = open_tasks(options, reporter)
    loaded = loading.open(reporter, model)
    one = _Evaluation(loaded, plans, text.held_out(loaded), text.batch_size, chosen)
    if out is None:
        one.measure(reporter)
        return
    with working_folder(out.with_name(f".{out.name}.eval.part")) as part:
        for path in (out, of_tasks):
            if path is not None:
                sweep(path.parent, path.name)
                check_table(path, overwrite)  # of another process, since the first check
        wait_in(loaded.model, part)
        tell_changes(part, one.hashes, reporter)
        rows, found = one.measure(reporter, part)
        write_table(out, results_rows(rows))
        if of_tasks is not None:
            write_table(of_tasks, [row.as_dict() for row in found])


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """What an evaluation measures, and on what."""

    loaded: LoadedModel
    plans: Mapping[str, Pruned]
    held_out: Windows
    batch_size: int
    tasks: TaskSet | None

    @property
    def hashes(self) -> dict[str, str]:
        """Of what a call that goes on must not have changed, by its name in words."""
        found = {"the model": weights_hash(self.loaded.model), "the held-out text": self.held_out.hash}
        return found if self.tasks is None else {**found, "the tasks": self.tasks.key}

    def measure(self, reporter: Reporter, part: Path | None = None) -> tuple[list[EvalRow], list[TaskRow]]:
        """Measure and print perplexities, then tasks; with a folder, what is measured is kept there on the way."""
        of_text, of_tasks = (part / f"{name}.json" if part else None for name in ("text", "tasks"))
        for path in (of_text, of_tasks):
            if path is not None:
                discard_damaged(reporter, path, read_state)
        model = self.loaded.model
        rows = compare_with_dense(reporter, model, self.plans, self.held_out, self.batch_size, of_text)
        print_results(rows, OUT)
        if self.tasks is None:
            return rows, []
        with reporter.task("downstream tasks", "requests") as update:
            given = model, self.loaded.tokenizer, self.plans, self.tasks
            found = compare_tasks(*given, state=of_tasks, on_requests=update)
        print_tasks(found, OUT)
        return rows, found


def score_all(
    loaded: LoadedModel,
    asked: Question,
    choice: opt.TextChoice,
    reporter: Reporter,
    folder: Path | None = None,
    windows: Windows | None = None,
    model_hash: str | None = None,
) -> dict[str, Scores]:
    """Calibrate for all metrics (once, or twice when one needs the core) and score; with a folder, also write both.

    ``windows`` are those of the choice, where they are cut already; ``model_hash``, where it is known. The passes leave
    their sums in the folder's `UNFINISHED`, which the caller removes once all else is done.
    """
    windows = choice.calibration(loaded) if windows is None else windows
    part = folder / UNFINISHED / "calibrate.safetensors" if folder else None
    known = model_hash or weights_hash(loaded.model)
    options = PassOptions(batch_size=choice.batch_size, checkpoint=part, keep_checkpoint=True, model_hash=known)
    facts = scoring_facts(loaded, known, asked, windows, choice.batch_size)
    given: Any = {"sites": asked.sites, "rule": asked.rule, "options": options}
    announce(reporter, calibration_bytes(asked.model, windows, asked.params, **given))
    for path in part.parent.glob(f"*{part.name}") if part else ():
        discard_damaged(reporter, path)
    with reporter.task("calibrate", "tokens") as update, naming_weights(loaded.model):
        stats, found = calibrate_and_score(asked, windows, options, update, facts)
    if folder:
        write_stats(folder / "statistics.safetensors", stats.values(), facts)
        write_scores(folder / "scores.safetensors", found.values(), facts)
    return found


def scoring_facts(
    loaded: LoadedModel, model_hash: str, asked: Question, windows: Windows, batch_size: int
) -> dict[str, Any]:
    """What scores and statistics were made from."""
    facts: dict[str, Any] = {"model": model_hash, **loaded.facts}
    facts |= {"calibration": describe_windows(windows)}
    facts["batch_size"] = batch_size
    if needs_core(asked.params):
        facts["core"] = asdict(asked.rule)
    if asked.reference is not None:
        facts["reference"] = weights_hash(asked.reference)
    return facts
