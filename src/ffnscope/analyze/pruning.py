"""All of a pruning but the cut, in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ffnscope.analyze.curves import CurveOptions
from ffnscope.analyze.measured import CurveRounds, plan_by_curves
from ffnscope.apply.held_out import FitStatistics, collect_held_out
from ffnscope.apply.method import GRADIENT_WINDOWS, Method, named_method, reconstruct_plan
from ffnscope.apply.pruned import Pruned
from ffnscope.apply.rounds import RoundSteps, plan_in_rounds
from ffnscope.apply.sequential import SequentialOptions
from ffnscope.calibrate.collect import PassOptions, collect, required_statistics, weights_hash
from ffnscope.calibrate.windows import Windows
from ffnscope.scoring import score
from ffnscope.types import Budget, ChannelStats, FFNSite, PruningPlan, Scores

OnStep = Callable[[int, int], None]


def plan_and_reconstruct(
    model: nn.Module,
    windows: Windows,
    budget: Budget | float,
    *,
    method: Method | str = "best",
    options: PassOptions | None = None,
    on_batch: OnStep | None = None,
    on_block: OnStep | None = None,
) -> Pruned:
    """Calibrate, score, plan and reconstruct: everything but the cut, for which see `reconstruct_` and `prune_`.

    With an allocator that reads measured curves these are measured on 16 of the windows, evenly spread over the text,
    in two rounds (`CurveRounds`), and refitted where the method refits; `plan_by_curves` takes other numbers or text.

    Args:
        model: the dense model; left as it was.
        windows: calibration text, also of the reconstruction; 128 windows of 256 tokens suit models of 1,536 channels
            per FFN, larger ones want at least 4 tokens per channel.
        budget: how much to remove; a number is a sparsity.
        method: a name of `METHODS` or your own. Its metric can need neither a core nor a reference model.
        options: sizes of the pass; default: 32 windows run backward. With a checkpoint, blocks of an unfinished
            reconstruction are in a folder beside it.
        on_batch: called with (tokens done, tokens in all) of each pass; for one-shot refits also of `collect_held_out`.
        on_block: called with (blocks done, blocks in all) of the reconstruction.

    Returns:
        A `Reconstruction`, or with reconstruct "none" a `PruningPlan`.

    Raises:
        UsageError: an impossible budget, or a metric that needs more.
        NotAvailableError, NonFiniteError, DeviceError, ArtifactError: see `collect` and `reconstruct_plan`.
    """
    method = named_method(method) if isinstance(method, str) else method
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    method.check_budget(budget)
    options = options or PassOptions(gradient_windows=GRADIENT_WINDOWS)
    options = replace(options, model_hash=options.model_hash or weights_hash(model))
    facts = {"model": options.model_hash}

    def calibrated(sizes: PassOptions, *more: str) -> tuple[dict[FFNSite, ChannelStats], Scores]:
        names = list(dict.fromkeys((*required_statistics([method.metric]), *more)))
        found = collect(model, windows, names, options=sizes, on_batch=on_batch)
        return found, score(model, found, method.metric, facts=facts)

    stats, scores = calibrated(options, *method.statistics, *method.curve_statistics)
    fit = _with_held_out(model, windows, stats, method, options, on_batch)
    given: Any = {"windows": windows, "stats": fit, "options": _sequential(options), "on_block": on_block}

    def again(number: int) -> Scores:
        part = _beside(options, f".round_{number}.safetensors")
        return calibrated(replace(options, model_hash=None, checkpoint=part))[1]

    if method.measures:
        plan = _by_curves(model, scores, stats, windows, budget, method, options)
    else:
        steps = RoundSteps(again, partial(reconstruct_plan, model, method=method.untrained, **given))
        plan = plan_in_rounds(model, scores, budget, method, steps)
    return reconstruct_plan(model, plan, method, **given)


def _sequential(options: PassOptions) -> SequentialOptions:
    blocks = _beside(options, ".blocks")
    return SequentialOptions(batch_size=options.batch_size, checkpoint=blocks, model_hash=options.model_hash)


def _with_held_out(
    model: nn.Module,
    windows: Windows,
    stats: Mapping[FFNSite, ChannelStats],
    method: Method,
    options: PassOptions,
    on_batch: OnStep | None,
) -> FitStatistics:
    if not method.holds_out:
        return FitStatistics(stats)
    part = replace(options, checkpoint=_beside(options, ".held_out.safetensors"))
    return FitStatistics(stats, collect_held_out(model, windows, options=part, on_batch=on_batch))


def _by_curves(
    model: nn.Module,
    scores: Scores,
    stats: Mapping[FFNSite, ChannelStats],
    windows: Windows,
    budget: Budget,
    method: Method,
    options: PassOptions,
) -> PruningPlan:
    curves = CurveOptions(batch_size=options.batch_size, checkpoint=_beside(options, ".json"))
    rounds = CurveRounds(options=curves, allocator=method.allocator)
    refit = stats if method.curve_statistics else None
    return plan_by_curves(model, scores, refit, rounds.windows(windows), budget, rounds=rounds)[0]


def _beside(options: PassOptions, suffix: str) -> Path | None:
    return None if options.checkpoint is None else options.checkpoint.with_suffix(suffix)
