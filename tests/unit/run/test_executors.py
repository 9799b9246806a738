"""What executes cells: submitit for real in processes of this machine, Ray by a stand-in with its interface."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from ffnscope.errors import UsageError
from ffnscope.run import SweepResult, executors, load_sweep, run_sweep, sweep_block
from ffnscope.run.executors import Task, distribute
from ffnscope.run.progress import Reporter
from runs import merged, results, small_run

PLAIN = {
    "metrics": {"scar": {"enabled": False}},
    "evaluation": {"samples": {"enabled": False}},
    "pruning": {"algorithms": ["wanda"]},
}


@pytest.fixture
def swept(checkpoint: Path, texts: Path, tmp_path: Path) -> Callable[..., SweepResult]:
    """Run a small sweep of two seeds."""

    def call(out: str, sweep: dict[str, Any], **changes: Any) -> SweepResult:
        path = tmp_path / f"{out}.yaml"
        asked = small_run(checkpoint, texts, tmp_path / out, **merged(PLAIN, changes))
        path.write_text(yaml.safe_dump({**asked, "sweep": {"calibration.seed": [0, 1], **sweep}}))
        return run_sweep(load_sweep(path), reporter=Reporter(Console(quiet=True)))

    return call


class Instant:
    """A backend whose jobs end when they are asked about, the last one first."""

    def __init__(self) -> None:
        self.most, self.running, self.cancelled = 0, list[Any](), list[Any]()

    def submit(self, task: Task) -> Any:
        self.running.append(task)
        self.most = max(self.most, len(self.running))
        return task

    def finished(self, jobs: Sequence[Any]) -> list[Any]:
        assert list(jobs) == self.running
        return [self.running.pop()]

    def error(self, job: Any) -> str | None:
        return "odd" if "seed: 1\n" in job.text else None

    def cancel(self, job: Any) -> None:
        self.cancelled.append(job)


@pytest.fixture
def cells(tmp_path: Path) -> Any:
    path = tmp_path / "many.yaml"
    path.write_text("model: {model_id: m}\nsweep: {experiment.seed: [0, 1, 2, 3]}\n")
    return load_sweep(path).cells


def test_no_more_cells_at_once_than_workers(cells: Any) -> None:
    backend = Instant()
    found = list(distribute(backend, cells, 2, overwrite=False))
    assert backend.most == 2
    assert backend.cancelled == []
    assert {one.cell.name: one.error for one in found} == {f"seed={n}": "odd" if n == 1 else None for n in range(4)}


def test_an_interrupt_ends_what_is_at_work(cells: Any) -> None:
    backend = Instant()
    outcomes = distribute(backend, cells, 3, overwrite=False)
    next(outcomes)
    outcomes.close()
    assert len(backend.cancelled) == 2
    assert backend.cancelled == backend.running


def test_an_executor_that_is_not_installed_is_named(
    swept: Callable[..., SweepResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(executors, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"sweep\.executor: ray is not installed: pip install 'ffnscope\[ray\]'"):
        swept("out", {"executor": "ray"})
    with pytest.raises(UsageError, match=r"pip install 'ffnscope\[slurm\]', or set sweep.executor: sequential"):
        swept("out", {"executor": "submitit"})
    assert not (tmp_path / "out").exists()


def test_submitit_runs_cells_in_processes(swept: Callable[..., SweepResult], tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    asked = {"calibration.seed": [0], "cells": [{"model.model_id": str(tmp_path / "none")}]}
    result = swept("jobs", {"executor": "submitit", "resources": {"timeout_min": 5}, **asked})
    (error,) = result.failed.values()
    assert "none does not exist" in error
    alone = swept("alone", {"calibration.seed": [0]})
    name = "seed=0"
    assert results(result.folder / name) == results(alone.folder / name)
    assert list((result.folder / "jobs").iterdir())


def test_a_dead_job_is_a_failed_cell(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    backend = executors.SubmititBackend({}, tmp_path)
    jobs = submitit.AutoExecutor(folder=tmp_path, cluster="debug")
    job = jobs.submit(Task("[", str(tmp_path), overwrite=False))
    told = backend.error(job) or ""
    assert "not valid YAML" in told and "(log: " in told


def test_a_preempted_job_is_submitted_again() -> None:
    submitit = pytest.importorskip("submitit")
    task = Task("model: {model_id: m}", ".", overwrite=True)
    again = task.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function is task


def test_resources_that_submitit_does_not_take(swept: Callable[..., SweepResult]) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(UsageError, match=r"sweep\.resources: submitit does not take them \(.*gpus"):
        swept("out", {"executor": "submitit", "resources": {"gpus": 1}})


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A module with what is used of Ray's interface, which works at once; returns what it was given."""
    given: dict[str, Any] = {"gpus": 0}
    module: Any = types.ModuleType("ray")
    module.__spec__ = importlib.machinery.ModuleSpec("ray", None)
    module.exceptions = types.SimpleNamespace(RayError=ArithmeticError)
    module.is_initialized = lambda: False
    module.init = lambda: given.update(begun=True)
    module.cluster_resources = lambda: {"CPU": 2.0, "GPU": given["gpus"]}

    def remote(**options: Any) -> Any:
        given.update(options=options)
        return lambda function: types.SimpleNamespace(remote=lambda task: (function, task))

    def get(job: Any) -> Any:
        if given.get("dies"):
            raise ArithmeticError("first line\nThe worker died.\n")
        return job[0](job[1])

    module.remote, module.get = remote, get
    module.wait = lambda jobs, num_returns, timeout: (jobs[:num_returns], jobs[num_returns:])
    module.cancel = lambda job, force: None
    monkeypatch.setitem(sys.modules, "ray", module)
    return given


def test_ray_runs_the_same_cells(swept: Callable[..., SweepResult], ray: dict[str, Any]) -> None:
    result = swept("ray", {"executor": "ray", "resources": {"num_cpus": 2}})
    assert result.failed == {}
    assert ray["begun"]
    assert ray["options"] == {"max_retries": 0, "num_cpus": 2}
    assert result.rows == swept("alone", {}).rows


def test_auto_is_ray_where_it_is_installed(
    swept: Callable[..., SweepResult], ray: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, found in (("there", object()), ("not_there", None)):
        monkeypatch.setattr(sweep_block, "find_spec", lambda asked, found=found: found)
        monkeypatch.setattr(executors, "find_spec", lambda asked, found=found: found)
        ray.pop("begun", None)
        assert swept(name, {"executor": "auto"}).failed == {}
        assert bool(ray.get("begun")) is (found is not None)


def test_ray_gives_a_cell_a_gpu_where_there_are_any_and_tells_dead_workers(
    swept: Callable[..., SweepResult], ray: dict[str, Any]
) -> None:
    ray.update(gpus=2.0, dies=True)
    assert swept("out", {"executor": "ray"}).failed == dict.fromkeys(("seed=0", "seed=1"), "The worker died.")
    assert ray["options"]["num_gpus"] == 1
