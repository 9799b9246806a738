"""Dense against pruned: size, FLOPs, memory and speed side by side, beside what weights and FLOPs allow."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ffnscope.apply.export import PLAN
from ffnscope.apply.slice import slice_
from ffnscope.calibrate.collect import weights_hash
from ffnscope.calibrate.forward import input_device
from ffnscope.errors import UsageError
from ffnscope.evaluate.costs import Costs, count_costs, file_bytes
from ffnscope.evaluate.pair import Removed, attention, check_alike, removed_parameters
from ffnscope.evaluate.peak import PeakMemory, Task, measurable, peak_memory
from ffnscope.evaluate.progress import DENSE
from ffnscope.evaluate.speed import PRUNED, BenchOptions, BenchResult, Measured
from ffnscope.evaluate.throughput import Rounds, take_turns, threads
from ffnscope.ffn.load import LoadedModel, ModelSource, load_model
from ffnscope.ffn.sites import find_sites
from ffnscope.io import read_plan
from ffnscope.types import PruningPlan

OnStep = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Contender:
    """One of the two models before anything was timed: where it is from, the plan to slice it by, and its facts."""

    source: ModelSource
    plan: PruningPlan | None
    name: str
    weights: str
    costs: Costs
    file_bytes: int | None


def bench(
    dense: ModelSource | str,
    pruned: ModelSource | str | None = None,
    *,
    plan: PruningPlan | None = None,
    options: BenchOptions | None = None,
    on_step: OnStep | None = None,
) -> BenchResult:
    """Load a dense model and its pruned form, check that they are a pair, and measure them in turn.

    Args:
        dense: the dense model.
        pruned: its pruned form; a string is loaded as ``dense`` is. None: ``dense`` is loaded again and sliced by
            ``plan`` in memory.
        plan: the plan that it was pruned by; None reads ``ffnscope_plan.json`` of the folder ``pruned`` if it is there.
        options: how to measure; None = the defaults.
        on_step: called after each round and each measurement of memory with (steps done, steps in all).

    Raises:
        UsageError: neither a second model nor a plan, two models that are no pair, more or less removed than planned,
            or tokens that do not fit.
        NotAvailableError: a model without a KV cache, or with experts that were not found.
        ModelError, DeviceError, ArtifactError: loading, memory, a damaged plan.
        NonFiniteError: a model's logits are NaN or infinite.
    """
    options = options or BenchOptions()
    one = ModelSource(dense) if isinstance(dense, str) else dense
    other, in_memory, plan = _second(one, pruned, plan)
    with threads(options.threads):
        contenders, removed, rounds, setting = _in_this_process(one, other, plan, in_memory, options, on_step)
        peaks = _peaks(contenders, options, torch.device(setting["device"]), on_step)
    one_measured, other_measured = (
        _measured(contender, rounds, label, peak)
        for label, contender, peak in zip((DENSE, PRUNED), contenders, peaks, strict=True)
    )
    return BenchResult(one_measured, other_measured, removed, rounds.bandwidth, rounds.matmul, options, setting)


def _second(
    dense: ModelSource, pruned: ModelSource | str | None, plan: PruningPlan | None
) -> tuple[ModelSource, bool, PruningPlan | None]:
    """Source of the pruned model, whether it is made in memory, and the plan."""
    if pruned is None:
        if plan is None:
            raise UsageError("give a second model (the pruned one), or a plan to slice the dense model by.")
        return dense, True, plan
    source = replace(dense, model_id=pruned, revision=None) if isinstance(pruned, str) else pruned
    card = Path(source.model_id) / PLAN
    return source, False, read_plan(card) if plan is None and card.exists() else plan


def _in_this_process(
    dense: ModelSource,
    pruned: ModelSource,
    plan: PruningPlan | None,
    in_memory: bool,
    options: BenchOptions,
    on_step: OnStep | None,
) -> tuple[list[_Contender], Removed, Rounds, dict[str, Any]]:
    """Load, check and time; both models are freed at the end."""
    one, other = load_model(dense), load_model(pruned)
    if in_memory and plan is not None:
        slice_(other.model, plan)
    check_alike(one, other)
    sites = [find_sites(loaded.model) for loaded in (one, other)]
    removed = removed_parameters(one.model, sites[0], other.model, sites[1], plan)
    costs = [count_costs(m.model, s, options.work) for m, s in zip((one, other), sites, strict=True)]
    more = _memory_steps(options, input_device(one.model))
    rounds = take_turns(
        {DENSE: one.model, PRUNED: other.model},
        options.work,
        repeats=options.repeats,
        warmup=options.warmup,
        seed=options.seed,
        on_round=None if on_step is None else lambda done, total: on_step(done, total + more),
    )
    contenders = [_contender(one, costs[0], None), _contender(other, costs[1], plan if in_memory else None)]
    return contenders, removed, rounds, _setting(one)


def _contender(loaded: LoadedModel, costs: Costs, plan: PruningPlan | None) -> _Contender:
    name = loaded.source.model_id
    size = file_bytes(loaded) if plan is None else None
    return _Contender(
        loaded.source, plan, name if plan is None else f"{name}, sliced", weights_hash(loaded.model), costs, size
    )


def _measured(one: _Contender, rounds: Rounds, label: str, peak: PeakMemory | None) -> Measured:
    times = (rounds.prefill[label], rounds.decode[label])
    return Measured(one.name, one.weights, one.costs, one.file_bytes, *times, rounds.cache_bytes[label], peak)


def _memory_steps(options: BenchOptions, device: torch.device) -> int:
    """Measurements of memory that follow the rounds."""
    return 2 if options.peak_memory and measurable(device) else 0


def _peaks(
    contenders: list[_Contender], options: BenchOptions, device: torch.device, on_step: OnStep | None
) -> list[PeakMemory | None]:
    steps = _memory_steps(options, device)
    if not steps:
        return [None, None]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    found: list[PeakMemory | None] = []
    rounds = options.warmup + options.repeats
    for number, one in enumerate(contenders, start=1):
        task = Task(one.source, one.plan, options.work, torch.get_num_threads(), options.seed)
        found.append(peak_memory(task))
        if on_step is not None:
            on_step(rounds + number, rounds + steps)
    return found


def _setting(loaded: LoadedModel) -> dict[str, Any]:
    weight = next(loaded.model.parameters())
    return {
        "device": str(weight.device),
        "device_name": _device_name(weight.device),
        "threads": torch.get_num_threads(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "attention": attention(loaded.model),
        "cache": "the default KV cache of transformers, which grows by copying",
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if device.type == "cpu" and described.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
