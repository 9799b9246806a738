"""What executes the cells of a sweep: this process, Ray, or submitit (SLURM)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ffnscope.errors import FFNScopeError, UsageError
from ffnscope.run.document import parse_document
from ffnscope.run.load import config_from_dict, dump_config
from ffnscope.run.progress import Reporter
from ffnscope.run.runner import run
from ffnscope.run.schema import RunConfig
from ffnscope.run.sweep_block import Sweep
from ffnscope.run.sweep_cells import Cell

FAILURES = (FFNScopeError, OSError, RuntimeError, ValueError, ArithmeticError, LookupError, ImportError, MemoryError)
"""What may stop one cell and not the others: errors of ours, of a model's code, of a device. Faults of the program
itself (a wrong attribute, a broken invariant) are none of these and end a sequential sweep."""
JOBS = "jobs"
"""Folder of submitit's scripts and logs."""
_INSTALL = {"ray": "pip install 'ffnscope[ray]'", "submitit": "pip install 'ffnscope[slurm]'"}
_DAY = 24 * 60
_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a cell ended: None, or what stopped it."""

    cell: Cell
    error: str | None


Execution = Generator[Outcome]


class Backend(Protocol):
    """What hands cells to other processes."""

    def submit(self, task: Task) -> Any:
        """Start a task somewhere; returns its job."""
        ...

    def finished(self, jobs: Sequence[Any]) -> list[Any]:
        """Wait a little, and return those that have ended."""
        ...

    def error(self, job: Any) -> str | None:
        """What stopped a job that has ended, or None."""
        ...

    def cancel(self, job: Any) -> None:
        """Interrupt a job."""
        ...


@dataclass(frozen=True, slots=True)
class Task:
    """A cell for another process.

    Attributes:
        text: its configuration as YAML, so that modules of the user's own are imported there as well.
        folder: the working folder, which relative paths begin at.
        overwrite: as `ffnscope.run.run` takes it.
    """

    text: str
    folder: str
    overwrite: bool

    def __call__(self) -> str | None:
        """Run the cell; returns what stopped it, or None."""
        with contextlib.chdir(self.folder):
            return attempt(config_from_dict(parse_document(self.text).data), Reporter(), overwrite=self.overwrite)

    def checkpoint(self) -> Any:
        """What submitit submits again after a preemption or at the time limit: the same, which goes on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def attempt(config: RunConfig, reporter: Reporter, *, overwrite: bool) -> str | None:
    """Run one cell; returns what stopped it, or None."""
    try:
        run(config, overwrite=overwrite, reporter=reporter)
    except FAILURES as error:
        return str(error) if isinstance(error, FFNScopeError) else f"{type(error).__name__}: {error}"
    return None


def check_executor(asked: Sweep) -> None:
    """Raise UsageError when the executor of a sweep is not installed."""
    if asked.engine != "sequential" and find_spec(asked.engine) is None:
        raise UsageError(
            f"sweep.executor: {asked.engine} is not installed: {_INSTALL[asked.engine]}, or set sweep.executor: "
            "sequential."
        )


def execute(asked: Sweep, folder: Path, cells: Sequence[Cell], *, overwrite: bool, reporter: Reporter) -> Execution:
    """Run cells, and yield how each ended, in the order in which they end.

    Raises:
        UsageError: the executor does not take ``resources``.
    """
    if asked.engine == "sequential":
        return _sequential(cells, reporter, overwrite=overwrite)
    backends: Mapping[str, Callable[[], Backend]] = {
        "ray": lambda: RayBackend(asked.resources),
        "submitit": lambda: SubmititBackend(asked.resources, folder / JOBS),
    }
    return distribute(backends[asked.engine](), cells, asked.workers or len(cells), overwrite=overwrite)


def _sequential(cells: Sequence[Cell], reporter: Reporter, *, overwrite: bool) -> Execution:
    for cell in cells:
        reporter.say(f"cell {cell.name}")
        yield Outcome(cell, attempt(cell.config, reporter, overwrite=overwrite))


def distribute(backend: Backend, cells: Sequence[Cell], workers: int, *, overwrite: bool) -> Execution:
    """Keep up to ``workers`` cells at work; those that still are when this is interrupted are interrupted too."""
    waiting, running = list(cells), dict[Any, Cell]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                cell = waiting.pop(0)
                task = Task(dump_config(cell.config), str(Path.cwd()), overwrite)
                running[backend.submit(task)] = cell
            for job in backend.finished(list(running)):
                yield Outcome(running.pop(job), backend.error(job))
    finally:
        for job in running:
            backend.cancel(job)


class RayBackend:
    """Cells as tasks of Ray: on the cluster that RAY_ADDRESS or an earlier ``ray.init`` names, else on this machine.

    Ray shows a task the GPUs that it has asked for, and no others; unless ``resources`` say otherwise a cell asks for
    one where there are any. A cell whose process dies is not tried again by Ray, but by the next call.
    """

    def __init__(self, resources: Mapping[str, Any]):
        ray: Any = import_module("ray")
        self._ray = ray
        if not ray.is_initialized():
            ray.init()
        gpus = {"num_gpus": 1} if ray.cluster_resources().get("GPU", 0) >= 1 else {}
        try:
            self._remote: Any = ray.remote(**{"max_retries": 0, **gpus, **resources})(_call)
        except (ValueError, TypeError) as error:
            raise UsageError(f"sweep.resources: ray.remote does not take them ({error}).") from error

    def submit(self, task: Task) -> Any:
        """Start a remote task."""
        return self._remote.remote(task)

    def finished(self, jobs: Sequence[Any]) -> list[Any]:
        """Those that have ended, after at most a second."""
        return self._ray.wait(list(jobs), num_returns=1, timeout=_POLL_SECONDS)[0]

    def error(self, job: Any) -> str | None:
        """The task's own answer, or the end of its process."""
        try:
            return self._ray.get(job)
        except self._ray.exceptions.RayError as error:
            return _last_line(error)

    def cancel(self, job: Any) -> None:
        """Raise KeyboardInterrupt in the task."""
        self._ray.cancel(job, force=False)


def _call(task: Task) -> str | None:
    """Call the task: ray.remote takes functions and classes only."""
    return task()


class SubmititBackend:
    """Cells as jobs of submitit: of SLURM where its commands are found, else processes of this machine.

    A job may take a day unless ``resources`` (timeout_min) say otherwise. Scripts and logs are in ``folder``.
    """

    def __init__(self, resources: Mapping[str, Any], folder: Path):
        import submitit

        self._executor: Any = submitit.AutoExecutor(folder=folder)
        try:
            self._executor.update_parameters(**{"timeout_min": _DAY, "name": "ffnscope", **resources})
        except (NameError, TypeError, ValueError, AssertionError) as error:
            raise UsageError(f"sweep.resources: submitit does not take them ({error}).") from error

    def submit(self, task: Task) -> Any:
        """Submit a job."""
        return self._executor.submit(task)

    def finished(self, jobs: Sequence[Any]) -> list[Any]:
        """Those that have ended; waits a second when there is none."""
        found = [job for job in jobs if job.done()]
        if not found:
            time.sleep(_POLL_SECONDS)
        return found

    def error(self, job: Any) -> str | None:
        """The task's own answer, or the end of its process and where its log is."""
        failed = job.exception()
        return job.result() if failed is None else f"{_last_line(failed)} (log: {job.paths.stderr})"

    def cancel(self, job: Any) -> None:
        """Take the job off the queue, or end it."""
        job.cancel()


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -=")]
    return lines[-1] if lines else type(error).__name__
