"""Peak memory of one generation, measured in a process of its own so that nothing else is counted."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffnscope.apply.slice import slice_
from ffnscope.errors import DeviceError, FFNScopeError
from ffnscope.evaluate.costs import Work
from ffnscope.evaluate.forward import evaluating
from ffnscope.evaluate.throughput import generate, memory_errors, random_prompt, threads
from ffnscope.ffn.load import ModelSource, load_model
from ffnscope.types import PruningPlan

_CHILD = "from ffnscope.evaluate.peak import child; child()"
_PROCESS = Path("/proc/self")


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Peak memory in bytes.

    Attributes:
        total: what the process held at most: resident on the CPU, allocated on CUDA.
        libraries: what it held before the generation beside the weights (Python, torch, transformers); 0 on CUDA.
    """

    total: int
    libraries: int

    @property
    def model(self) -> int:
        """What model, KV cache and activations took."""
        return self.total - self.libraries


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What the child process does: load, slice if there is a plan, generate once."""

    source: ModelSource
    plan: PruningPlan | None
    work: Work
    threads: int
    seed: int


def measurable(device: torch.device) -> bool:
    """Whether the peak can be measured: on CUDA, and on the CPU under Linux, whose counter can be set back."""
    return device.type == "cuda" or (device.type == "cpu" and (_PROCESS / "clear_refs").exists())


def peak_memory(task: Task) -> PeakMemory:
    """Measure the peak of prefill and decode, weights included, loading excluded, in a child process.

    Raises:
        DeviceError: the child failed, for example for lack of memory.
    """
    command = [sys.executable, "-c", _CHILD]
    done = subprocess.run(command, input=pickle.dumps(task), capture_output=True, check=False)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        reason = said[-1] if said else f"status {done.returncode}, perhaps killed for lack of memory"
        raise DeviceError(
            f"the process that measures the peak memory of {task.source.model_id} failed: {reason}. Leave it out "
            "(peak_memory=False, --no-memory), or free memory."
        )
    return PeakMemory(**json.loads(done.stdout.decode().strip().splitlines()[-1]))


def child() -> None:
    """Read a pickled task from standard input, write the peak as JSON to standard output."""
    task: Task = pickle.load(sys.stdin.buffer)
    try:
        found = _measure(task)
    except FFNScopeError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(1)
    print(json.dumps(asdict(found)))  # noqa: T201


def _measure(task: Task) -> PeakMemory:
    model: Any = load_model(task.source).model
    if task.plan is not None:
        slice_(model, task.plan)
    _detach_from_file(model)
    prompt = random_prompt(model, task.work, task.seed)
    with threads(task.threads), evaluating(model), memory_errors(task.work):
        if prompt.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(prompt.device)
            generate(model, prompt, task.work.new_tokens)
            return PeakMemory(torch.cuda.max_memory_allocated(prompt.device), 0)
        generate(model, prompt[:, :2], 1)  # what the first call loads and sets up belongs to the libraries
        libraries = _resident("VmRSS") - sum(p.nbytes for p in model.parameters())
        (_PROCESS / "clear_refs").write_text("5")  # sets VmHWM back to what is resident now
        generate(model, prompt, task.work.new_tokens)
    return PeakMemory(_resident("VmHWM"), libraries)


@torch.no_grad()
def _detach_from_file(model: nn.Module) -> None:
    """Copy weights that may still be pages of the mapped file, which stays resident as a whole after slicing."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _resident(counter: str) -> int:
    """A counter of this process's memory in bytes; 0 where there is none."""
    status = _PROCESS / "status"
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(counter)), 0)
