"""``ffnscope rank --validate --dry-run``: its passes, ablations and prunings, told with their memory and time."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console

from ffnscope.analyze.levels import calibration_passes
from ffnscope.analyze.memory import calibration_bytes
from ffnscope.analyze.question import Question
from ffnscope.analyze.suffix import prefix_of
from ffnscope.analyze.validate import FLOOR, ValidationOptions
from ffnscope.calibrate.collect import PassOptions, plan_steps
from ffnscope.calibrate.windows import Windows
from ffnscope.cli.score_estimate import reference_weights
from ffnscope.ffn.load import LoadedModel
from ffnscope.run.bounds import Workload, load_of_steps, load_of_text
from ffnscope.run.estimate import calibrate_line, evaluate_line, with_reading
from ffnscope.run.lines import Line, print_lines, with_more
from ffnscope.run.seconds import seconds_per_token
from ffnscope.run.solve_costs import moment_operations, score_line, seconds_per_operation
from ffnscope.run.switches import COMMAND, bounds_of, print_advice
from ffnscope.types import FFNSite

_STAGES = ("calibrate", "score", "evaluate")


def print_validation_estimate(
    loaded: LoadedModel,
    asked: Question,
    texts: tuple[Windows, Windows],
    options: ValidationOptions,
    libraries: int,
    console: Console,
) -> None:
    """Print what a validation would do; ``texts`` to calibrate and to measure on; ``libraries``: see `bounds_of`."""
    speed, operation = seconds_per_token(asked.model, asked.sites), seconds_per_operation(asked.model)
    lines = validation_lines(asked, texts, options, speed, operation)
    bounds = bounds_of(loaded, asked.sites, validation_work(asked, texts, options), libraries)
    print_lines(with_reading(lines, loaded, asked.sites), "rank --validate", console)
    print_advice(bounds, COMMAND, console)


def validation_lines(
    asked: Question, texts: tuple[Windows, Windows], options: ValidationOptions, speed: float, operation: float
) -> list[Line]:
    """Tell the stages; ``speed`` in seconds per token of a forward, ``operation``: see `seconds_per_operation`."""
    calibration, held_out = texts
    sizes, sites = PassOptions(batch_size=options.batch_size), asked.sites
    lines: list[Line] = []
    for names in calibration_passes(sites, asked.params, asked.rule, sizes):
        line = calibrate_line("calibrate", plan_steps(calibration, names, sizes), speed)
        lines.append(with_more(line, operation * moment_operations(sites, calibration.n_tokens, names)))
    what = f"{len(asked.params)} metrics x {sum(site.d_ff for site in sites):,} channels of {len(sites)} FFNs"
    lines += [score_line(what, sites, list(asked.params), operation), _ablate_line(asked, held_out, options, speed)]
    n_plans = len({*asked.params, FLOOR}) * len(options.sparsities) * len(options.allocators)
    if n_plans:
        told = evaluate_line(held_out, 1 + n_plans, speed)
        lines.append(Line("prune", told.what, told.seconds, told.reads, shared=told.shared))
    return lines


def validation_work(asked: Question, texts: tuple[Windows, Windows], options: ValidationOptions) -> Workload:
    """What a validation runs on; batches of ablations hold as many windows as those of an evaluation."""
    sizes = PassOptions(batch_size=options.batch_size)
    given: Any = {"sites": asked.sites, "rule": asked.rule, "options": sizes}
    passes = calibration_passes(**given, metrics=asked.params)
    steps = max((plan_steps(texts[0], names, sizes) for names in passes if names), key=len, default=[])
    return Workload(
        load_of_steps(steps, backward=False),
        load_of_steps(steps, backward=True),
        load_of_text([texts[1]], options.batch_size),
        calibration_bytes(asked.model, texts[0], asked.params, **given).beside_batches,
        more=reference_weights(asked),
        only=_STAGES,
    )


def _ablate_line(asked: Question, held_out: Windows, options: ValidationOptions, speed: float) -> Line:
    """Tell the ablations: a forward per batch, and for every channel one from its FFN's block on.

    A streamed model is read in each of them, and when it is tried whether the blocks before can be skipped.
    """
    shares = options.sample.shares(asked.sites)
    forwards = reads = 0.0
    for site, n in shares.items():
        share, copies = _share_from(asked.model, site), min(n, options.batch_size)
        batches = math.ceil(len(held_out) / (options.batch_size // copies))
        forwards += 1 + n * share
        reads += 2 + share + batches * (1 + math.ceil(n / copies) * share)
    tokens = held_out.n_tokens
    what = f"{sum(shares.values())} channels of {len(shares)} FFNs x {tokens:,} tokens, from their block on"
    return Line("ablate", what, forwards * tokens * speed, math.ceil(reads))


def _share_from(model: Any, site: FFNSite) -> float:
    """Share of the weights in a site's block and all that is after it."""
    skipped = sum(p.numel() for block in prefix_of(model, [site]).blocks for p in block.parameters())
    return 1 - skipped / sum(p.numel() for p in model.parameters())
