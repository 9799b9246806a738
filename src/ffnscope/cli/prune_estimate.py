"""``ffnscope prune --dry-run``: passes, tokens, memory and time; nothing is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.text import Text

from ffnscope.analyze.levels import calibration_passes
from ffnscope.analyze.measured import CurveRounds
from ffnscope.analyze.memory import CalibrationBytes
from ffnscope.calibrate.collect import plan_steps
from ffnscope.calibrate.steps import Step
from ffnscope.calibrate.windows import Windows
from ffnscope.cli.prune_job import PruneJob
from ffnscope.run.bounds import Workload, load_of_steps, load_of_text, refit_of
from ffnscope.run.estimate import (
    Line,
    calibrate_line,
    curves_line,
    evaluate_line,
    print_lines,
    refit_line,
    with_reading,
)
from ffnscope.run.saving import UNEVEN
from ffnscope.run.seconds import distillation_seconds, seconds_per_token, solve_seconds
from ffnscope.run.switches import COMMAND, bounds_of, print_advice
from ffnscope.types import Budget


def print_curves_estimate(job: PruneJob, rounds: CurveRounds, console: Console) -> None:
    """Print what `ffnscope curves` would do."""
    model, asked = job.loaded.model, job.asked
    speed = seconds_per_token(model, asked.sites)
    passes = calibration_passes(asked.sites, job.params, asked.rule, job.options()) if job.params else []
    lines = [calibrate_line("calibrate", plan_steps(job.windows, names, job.options()), speed) for names in passes]
    lines.append(curves_line(asked.sites, rounds, job.windows, speed, refits=job.method.refits))
    print_lines(lines, "curves", console)
    if passes:
        console.print(Text(f"{job.memory().told}, until it is finished"))


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
    lines = [calibrate_line("calibrate", steps, speed) for steps in each]
    channels = sum(site.d_ff for site in asked.sites)
    if rounds is not None:
        lines.append(curves_line(asked.sites, rounds, job.windows, speed, refits=method.refits))
    if asked.params:
        lines.append(Line("score", f"{method.metric} x {channels:,} channels of {len(asked.sites)} FFNs"))
    elif job.record is not None:
        lines.append(Line("score", f"none: {method.metric} of {job.record.origin}"))
    if asked.params or job.record is not None:
        what = f"{budget.sparsity:g} of the channels by {method.allocator}"
        uneven = method.allocator in UNEVEN
        lines.append(Line("plan", what + (": widths differ, so not stock transformers" if uneven else "")))
    for number in range(2, method.rounds + 1):
        again = [calibrate_line(f"round {number}", steps, speed) for steps in each]
        lines += [replace(line, what=f"{line.what}, of what is left") for line in again]
    lines += _reconstruction(job, budget, speed)
    if held_out is not None:
        lines.append(evaluate_line(held_out, 2, speed))
    memory = job.memory() if each else None
    bounds = bounds_of(job.loaded, asked.sites, _workload(job, each, memory, held_out), libraries)
    print_lines(with_reading(lines, job.loaded, asked.sites), "prune", console)
    if memory is not None:
        console.print(Text(f"{memory.told}, until it is finished"))
    if method.reconstruct == "sequential":
        taken = bounds.work.refit_states * bounds.setting.item + bounds.work.refit
        console.print(Text(f"the reconstruction needs up to {taken / 2**20:,.0f} MiB beside the model"))
    print_advice(bounds, COMMAND, console)


def _workload(
    job: PruneJob, passes: Sequence[Sequence[Step]], memory: CalibrationBytes | None, held_out: Windows | None
) -> Workload:
    most = max(passes, key=len, default=[])
    refit = (0, 0)
    if job.method.reconstruct == "sequential":
        refit = refit_of(job.loaded.model, job.asked.sites, job.windows, distils=job.method.distill is not None)
    return Workload(
        load_of_steps(most, backward=False),
        load_of_steps(most, backward=True),
        load_of_text([] if held_out is None else [held_out], job.text.batch_size),
        0 if memory is None else memory.beside_batches,
        *refit,
    )


def _reconstruction(job: PruneJob, budget: Budget, speed: float) -> list[Line]:
    method, model, sites = job.method, job.loaded.model, job.asked.sites
    share = 1 - budget.sparsity
    if method.reconstruct == "bias":
        return [Line("reconstruct", f"a bias for each of {len(sites)} FFNs")]
    if method.reconstruct == "one_shot":
        seconds = solve_seconds(model, sites, share, chooses=False)
        return [Line("reconstruct", f"least squares of {len(sites)} FFNs", seconds)]
    if method.reconstruct != "sequential":
        return []
    one = refit_line(model, sites, job.windows, share, speed, chooses=method.damping is None)
    tokens = 2 * job.windows.n_tokens * method.rounds
    what = f"block by block: {tokens:,} tokens forward, and least squares of {len(sites)} FFNs"
    found = Line("reconstruct", what, method.rounds * (one.seconds or 0), method.rounds * one.reads)
    return [found, *_distillation(job, budget, speed)]


def _distillation(job: PruneJob, budget: Budget, speed: float) -> list[Line]:
    epochs = job.method.distill
    if epochs is None:
        return []
    epoch = distillation_seconds(job.loaded.model, job.asked.sites, job.windows.n_tokens, speed)
    what = f"up to {epochs} epochs over {job.windows.n_tokens:,} tokens in each FFN (trained)"
    return [Line("distill", what, epochs * (1 - budget.sparsity) * epoch)]
