"""What a run would do: passes, tokens, memory and time, told before anything long starts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.text import Text

from ffnscope.analyze.levels import calibration_passes
from ffnscope.analyze.measured import CurveRounds, curve_cuts
from ffnscope.analyze.memory import CalibrationBytes, calibration_bytes
from ffnscope.analyze.nulls import enough_draws
from ffnscope.apply.few_tokens import few_tokens
from ffnscope.calibrate.blocks import list_of_blocks
from ffnscope.calibrate.collect import plan_steps
from ffnscope.calibrate.parallel import n_processes
from ffnscope.calibrate.steps import Step
from ffnscope.calibrate.windows import Windows
from ffnscope.ffn.load import LoadedModel, quiet_transformers
from ffnscope.ffn.offload import resident
from ffnscope.ffn.sites import find_sites
from ffnscope.run.bounds import Load, Workload, curve_bytes, load_of_steps, load_of_text, refit_of
from ffnscope.run.checkpoints import check_format
from ffnscope.run.choices import (
    calibration_extra,
    core_rule,
    metric_params,
    model_source,
    pass_options,
    reference_bytes,
)
from ffnscope.run.contextual import open_card
from ffnscope.run.folder import check_folder
from ffnscope.run.held_out import damping_told, held_out_bytes, held_out_told
from ffnscope.run.lines import Line, print_lines, with_more
from ffnscope.run.machine import library_bytes
from ffnscope.run.outputs import check_plots
from ffnscope.run.reconstructions import check_sites
from ffnscope.run.schema import RunConfig
from ffnscope.run.seconds import SAVE_SECONDS, distillation_seconds, seconds_per_token
from ffnscope.run.solve_costs import (
    curve_operations,
    moment_operations,
    refit_operations,
    score_line,
    seconds_per_operation,
)
from ffnscope.run.sparse_estimate import card_lines, card_work, probe_card
from ffnscope.run.sparse_steps import CardJob
from ffnscope.run.switches import FILE, Bounds, bounds_of, load_to_estimate, print_advice
from ffnscope.run.task_estimate import TOKENS_OF_ONE_STEP, load_of_tasks, tasks_lines, tasks_of
from ffnscope.run.windows import evaluation_windows, sized
from ffnscope.sparse.probe import FitTime
from ffnscope.types import FFNSite

_CHECK = 2  # readings of a streamed model by which it is checked to be a chain of blocks


@dataclass(frozen=True, slots=True)
class Estimate:
    """Lines per stage, bounds of memory, the statistics of each pass, what they take, and a text that is too short."""

    lines: list[Line]
    bounds: Bounds
    statistics: list[list[str]]
    calibration: CalibrationBytes
    warning: str | None = None

    @property
    def peak_bytes(self) -> int:
        """Peak memory of the model's device in bytes."""
        return self.bounds.need.device

    @property
    def seconds(self) -> float:
        """Time of all stages whose time is told: those that take seconds are not."""
        return sum(line.seconds for line in self.lines if line.seconds and not math.isnan(line.seconds))


def estimate(config: RunConfig, *, overwrite: bool = False, libraries: int | None = None) -> Estimate:
    """Load model and text, run nothing, and estimate from shapes and a short probe of the machine's speed.

    What would stop the run at once stops this too: a folder that is not this run's, a model or a text that is missing,
    a text that is too short. Stages whose results are there already are counted as if they ran. ``libraries`` is main
    memory in bytes that a process takes before it loads a model; None = what this one takes now.
    """
    check_plots(config)
    check_folder(config, overwrite=overwrite)
    libraries = library_bytes() if libraries is None else libraries
    loaded = load_to_estimate(model_source(config))
    check_format(config, loaded)
    sites = find_sites(loaded.model, config.model.tracked_layers)
    check_sites(config, sites)
    config, calibration = sized(config, loaded, sites)
    held_out = evaluation_windows(config, loaded)
    tasks = tasks_of(config, loaded.tokenizer)
    metrics = {name: metric_params(config, name) for name in config.metric_names}
    rule, options = core_rule(config), pass_options(config)
    extra = calibration_extra(config, sites, calibration)
    passes = calibration_passes(sites, metrics, rule, options, extra)
    each = [plan_steps(calibration, names, options) for names in passes]
    steps = [step for one in each for step in one]
    given: Any = {"sites": sites, "rule": rule, "options": options, "extra": extra}
    found = calibration_bytes(loaded.model, calibration, metrics, **given)
    speed, operation = seconds_per_token(loaded.model, sites), seconds_per_operation(loaded.model)
    holds_out, card = config.pruning.holds_out, open_card(config, loaded, sites, calibration)
    probed = None if card is None else probe_card(card)
    lines = [
        *_calibrate_lines(each, passes, sites, speed, operation),
        *_curves_lines(config, sites, calibration, speed, operation),
        *_decision_lines(config, sites, operation),
        *(held_out_lines(sites, calibration, speed) if holds_out else []),
        *_round_lines(config, steps, speed),
        *_reconstruction_lines(config, sites, calibration, speed, operation),
        *_distillation_lines(config, loaded.model, sites, calibration, speed),
        *_analysis_lines(config, len(sites), calibration, speed),
        *_evaluation_lines(config, held_out, loaded.tokenizer, speed),
        *tasks_lines(tasks, 1 + _n_plans(config), speed),
        *_contextual_lines(card, probed, speed),
        *_checkpoint_lines(config, loaded.model),
    ]
    work = replace(
        _work(config, loaded.model, sites, calibration, held_out, each, found),
        contextual=0 if card is None else card_work(card, probed).contextual,
        tasks=load_of_tasks(tasks),
    )
    bounds = bounds_of(loaded, sites, work, libraries)
    few = few_tokens(loaded.model, sites, calibration.n_tokens) if config.pruning.refitted else None
    return Estimate(with_reading(lines, loaded, sites), bounds, passes, found, few)


def _work(
    config: RunConfig,
    model: Any,
    sites: Sequence[FFNSite],
    calibration: Windows,
    held_out: Sequence[Windows],
    passes: Sequence[Sequence[Step]],
    found: CalibrationBytes,
) -> Workload:
    """What the stages run on, without tasks and contextual sparsity."""
    refit, most = (0, 0), max(passes, key=_tokens, default=[])
    if config.pruning.enabled and config.pruning.reconstruct == "sequential":
        refit = refit_of(model, sites, calibration, distils=config.pruning.distill is not None)
    held = held_out_bytes(sites, calibration) if config.pruning.holds_out else 0
    curves, columns = _curve_work(config, model, sites, calibration, found.disk)
    return Workload(
        load_of_steps(most, backward=False),
        load_of_steps(most, backward=True),
        load_of_text(held_out, config.dataset.batch_size),
        max(found.beside_batches, found.disk + held),
        *refit,
        more=reference_bytes(config),
        reloads=config.output.checkpoints and config.model.device_map is None,
        curves=curves,
        columns=columns,
    )


def _curve_work(
    config: RunConfig, model: Any, sites: Sequence[FFNSite], calibration: Windows, statistics: int
) -> tuple[Load, int]:
    """The text on which curves are measured, and bytes beside its logits: all statistics of the run are in memory."""
    asked = config.pruning
    if not asked.measures:
        return Load(), 0
    rounds, refits = asked.curve_rounds(config.calibration.batch_size), asked.chosen(asked.algorithms[0]).refits
    text, beside = curve_bytes(model, sites, rounds, calibration, statistics if refits else 0)
    return text, beside if refits else beside + statistics


def _tokens(steps: Sequence[Step]) -> int:
    return sum(step.batch.input_ids.numel() * (1 + step.backward) for step in steps)


def print_estimate(config: RunConfig, console: Console, *, overwrite: bool = False) -> None:
    """Print the estimate as a table."""
    with quiet_transformers():
        found = estimate(config, overwrite=overwrite)
    print_lines(found.lines, config.experiment.name, console)
    for i, names in enumerate(found.statistics, 1):
        what = ", ".join(names) if names else "nothing: there is no pass"
        console.print(Text(f"calibration pass {i} of {len(found.statistics)} collects: {what}"))
    console.print(Text(found.calibration.told))
    if found.warning:
        console.print(Text(f"warning: {found.warning}"))
    print_advice(found.bounds, FILE, console)
    console.print(Text(f"output in {config.output_dir}"))


def with_reading(lines: Sequence[Line], loaded: LoadedModel, sites: Sequence[FFNSite]) -> list[Line]:
    """Lines for the processes there are, with what a streamed model takes longer, from a reading of its first block."""
    lines = [line.among(n_processes()) for line in lines]
    if loaded.source.stream is None:
        return lines
    block = list_of_blocks(loaded.model, [site for site in sites if site.role == "ffn"])[1][0]
    start = time.perf_counter()
    with resident(loaded.model, block):
        seconds = time.perf_counter() - start
    every = seconds * sum(p.numel() for p in loaded.model.parameters()) / sum(p.numel() for p in block.parameters())
    return [
        replace(line, seconds=line.seconds + line.reads * every + line.again) if line.seconds is not None else line
        for line in lines
    ]


def calibrate_line(stage: str, steps: Sequence[Step], speed: float) -> Line:
    """Tell one pass over the text; ``speed`` in seconds per token of a forward."""
    forward = sum(s.batch.n_tokens for s in steps)
    backward = sum(s.batch.n_tokens for s in steps if s.backward)
    if not forward:
        return Line(stage, "no pass: every metric reads weights only")
    what = f"1 pass: {forward:,} tokens forward" + (f", {backward:,} of them backward" if backward else "")
    return Line(stage, what, (forward + backward) * speed, _CHECK + 1 + bool(backward), backward * speed, shared=True)


def held_out_lines(sites: Sequence[FFNSite], calibration: Windows, speed: float) -> list[Line]:
    """Tell the pass over the windows that choose the damping of one-shot reconstructions, where there are any."""
    what, tokens = held_out_told(sites, calibration)
    return [Line("held-out windows", what, tokens * speed, _CHECK + 1, shared=True)] if tokens else []


def curves_line(
    sites: Sequence[FFNSite], rounds: CurveRounds, calibration: Windows, speed: float, operation: float | None
) -> Line:
    """Tell the measuring of loss curves.

    ``speed`` in seconds per token of a forward; ``operation`` in those per operation of least squares in float64, see
    `seconds_per_operation`, None = no cut is refitted.
    """
    cuts = curve_cuts(sites, rounds)
    windows = rounds.windows(calibration)
    tokens, forwards = windows.n_tokens, cuts / 2 + 2 * rounds.rounds
    seconds, reads = forwards * tokens * speed, math.ceil(forwards * len(windows) / rounds.options.batch_size)
    if operation is not None:
        seconds += operation * curve_operations(sites, rounds)
    what = f"{cuts:,} cuts in {rounds.rounds} round(s) x {tokens:,} tokens, on average half of the layers"
    return Line("measure curves", what + ("" if operation is None else ", each refitted"), seconds, reads)


def _curves_lines(
    config: RunConfig, sites: Sequence[FFNSite], calibration: Windows, speed: float, operation: float
) -> list[Line]:
    """The first round for every metric, the others for every plan."""
    asked = config.pruning
    if not asked.measures:
        return []
    rounds = asked.curve_rounds(config.calibration.batch_size)
    fits = operation if asked.chosen(asked.algorithms[0]).refits else None
    first = curves_line(sites, replace(rounds, rounds=1), calibration, speed, fits)
    every = curves_line(sites, rounds, calibration, speed, fits)
    n_metrics, n_plans = len(asked.algorithms), _n_plans(config)
    seconds = n_metrics * (first.seconds or 0) + n_plans * ((every.seconds or 0) - (first.seconds or 0))
    what = f"{every.what}; the first round for {n_metrics} metric(s), the others for {n_plans} plan(s)"
    return [Line(every.stage, what, seconds, n_metrics * first.reads + n_plans * (every.reads - first.reads))]


def _calibrate_lines(
    each: Sequence[Sequence[Step]],
    passes: Sequence[Sequence[str]],
    sites: Sequence[FFNSite],
    speed: float,
    operation: float,
) -> list[Line]:
    found: list[Line] = []
    for i, (steps, names) in enumerate(zip(each, passes, strict=True), 1):
        sums = operation * moment_operations(sites, sum(step.batch.n_tokens for step in steps), names)
        name = f"calibrate {i}" if len(each) > 1 else "calibrate"
        found.append(with_more(calibrate_line(name, steps, speed), sums))
    return found


def _decision_lines(config: RunConfig, sites: Sequence[FFNSite], operation: float) -> list[Line]:
    channels = sum(s.d_ff for s in sites)
    what = f"{len(config.metric_names)} metrics x {channels:,} channels of {len(sites)} FFNs"
    scores = score_line(what, sites, config.metric_names, operation)
    return [scores, Line("plan", f"{_n_plans(config)} plans")]


def _round_lines(config: RunConfig, steps: Sequence[Step], speed: float) -> list[Line]:
    """Further calibrations of pruned models; the first one, for all metrics, is the most that one of them takes."""
    again = _n_plans(config) * (config.pruning.rounds - 1)
    if not again:
        return []
    tokens = sum(s.batch.n_tokens * (1 + s.backward) for s in steps)
    backward = sum(s.batch.n_tokens for s in steps if s.backward)
    reads, more = again * (_CHECK + 1 + bool(backward)), again * backward * speed
    return [Line("rounds", f"{again} more calibrations, of what is left", again * tokens * speed, reads, more)]


def _reconstruction_lines(
    config: RunConfig, sites: Sequence[FFNSite], calibration: Windows, speed: float, operation: float
) -> list[Line]:
    asked = config.pruning
    if not asked.reconstructs:
        return []
    method, n_metrics = asked.chosen(asked.algorithms[0]), len(asked.algorithms)
    each = (refit_operations(sites, method, 1 - ratio, calibration.n_tokens) for ratio in asked.ratios)
    solves = n_metrics * asked.rounds * operation * sum(each)
    if asked.reconstruct == "bias":
        return [Line("reconstruct", f"{_n_plans(config)} plans x a bias for each of {len(sites)} FFNs")]
    if asked.reconstruct == "one_shot":
        what = f"least squares of {len(sites)} FFNs, {damping_told(asked.damping, calibration)}"
        return [Line("reconstruct", f"{_n_plans(config)} plans x {what}", solves)]
    tokens = 2 * calibration.n_tokens * asked.rounds
    n_plans = _n_plans(config)
    what = f"{n_plans} plans x {tokens:,} tokens forward, block by block"
    seconds = n_plans * tokens * speed + solves
    return [Line("reconstruct", what, seconds, n_plans * asked.rounds * (_CHECK + 1))]


def _distillation_lines(
    config: RunConfig, model: Any, sites: Sequence[FFNSite], calibration: Windows, speed: float
) -> list[Line]:
    epochs, ratios = config.pruning.distill, config.pruning.ratios
    if not config.pruning.reconstructs or epochs is None:
        return []
    kept = sum(1 - ratio for ratio in ratios) * len(config.pruning.algorithms)
    seconds = epochs * kept * distillation_seconds(model, sites, calibration.n_tokens, speed)
    return [Line("distill", f"{_n_plans(config)} plans x up to {epochs} epochs in each FFN (trained)", seconds)]


def _analysis_lines(config: RunConfig, n_sites: int, calibration: Windows, speed: float) -> list[Line]:
    """The analyses: most take seconds to a few minutes; further calibrations of the core are passes over text."""
    found: list[Line] = []
    for name in ("concentration", "halo", "cross_layer"):
        block = getattr(config, name)
        draws = block.draws or enough_draws(n_sites)
        found += [Line(name.replace("_", " "), f"{draws} draws")] if block.enabled else []
    asked = config.supernode.stability
    others = len(asked.seeds) + len(asked.texts)
    if config.supernode.enabled and asked.enabled and others:
        tokens = others * calibration.n_tokens
        what = f"the core of {others} other calibrations: {tokens:,} tokens forward and backward"
        found.append(Line("stability", what, 2 * tokens * speed, others * (_CHECK + 2), tokens * speed))
    return found


def _evaluation_lines(config: RunConfig, held_out: Sequence[Windows], tokenizer: Any, speed: float) -> list[Line]:
    models = 1 + _n_plans(config)
    lines = [evaluate_line(w, models, speed) for w in held_out]
    lines += _ablation_lines(config, held_out, speed)
    if config.generates_samples:
        asked = config.evaluation.samples
        steps = models * asked.max_new_tokens * (1 if tokenizer.pad_token_id is not None else len(asked.prompts))
        what = f"{models * len(asked.prompts)} texts of up to {asked.max_new_tokens} tokens"
        lines.append(Line("samples", what, steps * speed * TOKENS_OF_ONE_STEP, steps))
    return lines


def _checkpoint_lines(config: RunConfig, model: Any) -> list[Line]:
    if not config.output.checkpoints:
        return []
    n_plans = _n_plans(config)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return [Line("checkpoints", f"{n_plans} models", n_plans * size * SAVE_SECONDS)]


def evaluate_line(windows: Windows, n_models: int, speed: float) -> Line:
    """Tell the perplexity of some models on a text; ``speed`` in seconds per token of a forward."""
    what = f"{n_models} models x {windows.n_tokens:,} tokens of {windows.source}"
    return Line("evaluate", what, n_models * windows.n_tokens * speed, _CHECK + n_models, shared=True)


def _ablation_lines(config: RunConfig, held_out: Sequence[Windows], speed: float) -> list[Line]:
    asked = config.ablation
    if not asked.enabled:
        return []
    windows, found = held_out[0][: asked.num_samples], list[Line]()
    tokens, batches = windows.n_tokens, math.ceil(len(windows) / config.dataset.batch_size)
    if config.supernode.enabled:
        halos = 2 * config.halo.enabled
        sets = 2 * (1 + 2 * halos + 2 * asked.draws) + len(asked.dose_shares) * asked.draws
        found.append(
            Line("ablate sets", f"{sets} sets x {tokens:,} tokens", (1 + sets) * tokens * speed, (1 + sets) * batches)
        )
    if asked.channels:
        what = f"{asked.channels} channels x {tokens:,} tokens, on average half of the layers"
        found.append(Line("ablate channels", what, asked.channels * tokens * speed / 2))
    return found


def _contextual_lines(asked: CardJob | None, probed: FitTime | None, speed: float) -> list[Line]:
    lines = [] if asked is None else card_lines(asked, probed, speed)
    return [replace(line, stage=f"contextual {line.stage}") for line in lines]


def _n_plans(config: RunConfig) -> int:
    return len(config.pruning.algorithms) * len(config.pruning.ratios) if config.pruning.enabled else 0
