"""``ffnscope prune --dry-run``: passes, tokens, memory and time; nothing is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from rich.console import Console
from rich.text import Text

from ffnscope.analyze.levels import calibration_passes
from ffnscope.analyze.measured import CurveRounds
from ffnscope.analyze.memory import CalibrationBytes
from ffnscope.calibrate.collect import plan_steps
from ffnscope.calibrate.memory import statistics_bytes
from ffnscope.calibrate.steps import Step
from ffnscope.calibrate.windows import Windows
from ffnscope.cli.prune_job import PruneJob
from ffnscope.run.bounds import Load, Workload, curve_bytes, load_of_steps, load_of_text, refit_of
from ffnscope.run.estimate import (
    calibrate_line,
    curves_line,
    evaluate_line,
    held_out_lines,
    with_reading,
)
from ffnscope.run.held_out import damping_told, held_out_bytes
from ffnscope.run.lines import Line, print_lines, with_more
from ffnscope.run.saving import UNEVEN
from ffnscope.run.seconds import distillation_seconds, seconds_per_token
from ffnscope.run.solve_costs import (
    MOMENTS,
    moment_operations,
    order_operations,
    refit_operations,
    score_line,
    seconds_per_operation,
)
from ffnscope.run.switches import COMMAND, bounds_of, print_advice
from ffnscope.types import Budget


def print_curves_estimate(job: PruneJob, rounds: CurveRounds, libraries: int, console: Console) -> None:
    """Print what `ffnscope curves` would do; ``libraries``: see `bounds_of`."""
    model, asked = job.loaded.model, job.asked
    speed = seconds_per_token(model, asked.sites)
    passes = calibration_passes(asked.sites, job.params, asked.rule, job.options()) if job.params else []
    each = [plan_steps(job.windows, names, job.options()) for names in passes]
    operation, tokens = seconds_per_operation(model), job.windows.n_tokens
    lines = [
        with_more(calibrate_line("calibrate", steps, speed), operation * moment_operations(asked.sites, tokens, names))
        for steps, names in zip(each, passes, strict=True)
    ]
    if asked.params:
        what = f"{job.method.metric} x {sum(site.d_ff for site in asked.sites):,} channels of {len(asked.sites)} FFNs"
        lines.append(score_line(what, asked.sites, [job.method.metric], operation))
    fits = operation if job.method.refits else None
    lines.append(curves_line(asked.sites, rounds, job.windows, speed, fits))
    memory = job.memory() if any(each) else None
    work = replace(_workload(job, each, memory, None, rounds), only=("calibrate", "score", "curves"))
    bounds = bounds_of(job.loaded, asked.sites, work, libraries)
    print_lines(with_reading(lines, job.loaded, asked.sites), "curves", console)
    if memory is not None:
        console.print(Text(f"{memory.told}, until it is finished"))
    print_advice(bounds, COMMAND, console)


def print_prune_estimate(
    job: PruneJob,
    budget: Budget,
    held_out: Windows | None,
    libraries: int,
    console: Console,
    rounds: CurveRounds | None = None,
) -> None:
    """Print what `ffnscope prune` would do; ``libraries``: see `bounds_of`."""
    model, asked, method = job.loaded.model, job.asked, job.method
    speed = seconds_per_token(model, asked.sites)
    passes = calibration_passes(asked.sites, job.params, asked.rule, job.options()) if job.params else []
    each = [plan_steps(job.windows, names, job.options()) for names in passes if names]
    operation = seconds_per_operation(model)
    sums = operation * moment_operations(asked.sites, job.windows.n_tokens, chain.from_iterable(passes)) if each else 0
    lines = [with_more(line, sums / len(each)) for line in (calibrate_line("calibrate", s, speed) for s in each)]
    holds_out = job.record is None and job.n_held_out > 0
    lines += held_out_lines(asked.sites, job.windows, speed) if holds_out else []
    channels = sum(site.d_ff for site in asked.sites)
    if rounds is not None:
        fits = operation if method.refits else None
        lines.append(curves_line(asked.sites, rounds, job.windows, speed, fits))
    if asked.params:
        what = f"{method.metric} x {channels:,} channels of {len(asked.sites)} FFNs"
        lines.append(score_line(what, asked.sites, [method.metric], operation))
    elif job.record is not None:
        lines.append(Line("score", f"none: {method.metric} of {job.record.origin}"))
    if asked.params or job.record is not None:
        what = f"{budget.sparsity:g} of the channels by {method.allocator}"
        uneven = method.allocator in UNEVEN
        lines.append(Line("plan", what + (": widths differ, so not stock transformers" if uneven else "")))
    for number in range(2, method.rounds + 1):
        again = [calibrate_line(f"round {number}", steps, speed) for steps in each]
        more = sums + operation * order_operations(asked.sites, method.metric)
        lines += [with_more(replace(line, what=f"{line.what}, of what is left", shared=False), more) for line in again]
    lines += _reconstruction(job, budget, speed, operation)
    if held_out is not None:
        lines.append(evaluate_line(held_out, 2, speed))
    memory = job.memory() if each else None
    bounds = bounds_of(job.loaded, asked.sites, _workload(job, each, memory, held_out, rounds), libraries)
    print_lines(with_reading(lines, job.loaded, asked.sites), "prune", console)
    if memory is not None:
        console.print(Text(f"{memory.told}, until it is finished"))
    if method.reconstruct == "sequential":
        taken = bounds.work.refit_states * bounds.setting.item + bounds.work.refit
        console.print(Text(f"the reconstruction needs up to {taken / 2**20:,.0f} MiB beside the model"))
    print_advice(bounds, COMMAND, console)


def _reconstruction(job: PruneJob, budget: Budget, speed: float, operation: float) -> list[Line]:
    method, sites, tokens = job.method, job.asked.sites, job.windows.n_tokens if job.reads_text else 0
    solves = method.rounds * operation * refit_operations(sites, method, 1 - budget.sparsity, tokens)
    if method.reconstruct == "sequential":
        forward = 2 * tokens * method.rounds
        what = f"block by block: {forward:,} tokens forward, least squares of {len(sites)} FFNs"
        line = Line("reconstruct", what, forward * speed + solves, 3 * method.rounds)
        return [line, *_distillation(job, budget, speed)]
    if method.reconstruct == "one_shot":
        return [Line("reconstruct", f"least squares of {len(sites)} FFNs, {_damping(job)}", solves)]
    return [Line("reconstruct", f"a bias for each of {len(sites)} FFNs")] if method.reconstruct == "bias" else []


def _workload(
    job: PruneJob,
    passes: Sequence[Sequence[Step]],
    memory: CalibrationBytes | None,
    held_out: Windows | None,
    rounds: CurveRounds | None,
) -> Workload:
    most = max(passes, key=len, default=[])
    sums = 0 if memory is None else memory.beside_batches
    if memory is not None and job.record is None and job.n_held_out:
        sums = max(sums, memory.disk + held_out_bytes(job.asked.sites, job.windows))
    refit = (0, 0)
    if job.method.reconstruct == "sequential":
        refit = refit_of(job.loaded.model, job.asked.sites, job.windows, distils=job.method.distill is not None)
    curves, columns = Load(), 0
    if rounds is not None:
        moments = statistics_bytes(job.asked.sites, [MOMENTS]) if job.method.refits else 0
        curves, columns = curve_bytes(job.loaded.model, job.asked.sites, rounds, job.windows, moments)
    return Workload(
        load_of_steps(most, backward=False),
        load_of_steps(most, backward=True),
        load_of_text([] if held_out is None else [held_out], job.text.batch_size),
        sums,
        *refit,
        curves=curves,
        columns=columns,
    )


def _damping(job: PruneJob) -> str:
    return damping_told(job.method.damping, job.windows if job.n_held_out else None)


def _distillation(job: PruneJob, budget: Budget, speed: float) -> list[Line]:
    epochs = job.method.distill
    if epochs is None:
        return []
    epoch = distillation_seconds(job.loaded.model, job.asked.sites, job.windows.n_tokens, speed)
    what = f"up to {epochs} epochs over {job.windows.n_tokens:,} tokens in each FFN (trained)"
    return [Line("distill", what, epochs * (1 - budget.sparsity) * epoch)]
