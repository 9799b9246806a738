"""Options of measured loss curves, and what the commands curves and prune do with them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ffnscope.analyze.curves import CurveOptions
from ffnscope.analyze.measured import WINDOWS, CurveRounds, measure_round, solve_in_rounds
from ffnscope.apply.method import Method
from ffnscope.cli import options as opt
from ffnscope.cli.groups import option_names
from ffnscope.cli.prune_job import PruneJob
from ffnscope.errors import UsageError
from ffnscope.io import read_state, write_csv
from ffnscope.plan.curves import Curves, read_curves, write_curves
from ffnscope.run.steps import discard_damaged
from ffnscope.types import ChannelStats, FFNSite, PruningPlan, Scores

NAME = "ffnscope_curves"
"""Beginning of the files in a checkpoint."""


@dataclass(frozen=True, slots=True)
class CurveChoice:
    """Where the curves of ``--allocator measured`` come from."""

    curves: Annotated[
        Path | None, typer.Option(help="First round of --allocator measured: a file that `curves` wrote.")
    ] = None
    curve_rounds: Annotated[
        int, typer.Option(help="Of --allocator measured: 1, or more to measure again around each solution.")
    ] = 2
    curve_samples: Annotated[int, typer.Option(help="Calibration windows on which curves are measured.")] = WINDOWS

    def check(self, context: typer.Context, method: Method, plan: Path | None) -> None:
        """Raise UsageError for what is impossible, or would do nothing; beside a plan other checks speak."""
        if plan is not None:
            return
        if not method.measures:
            beside = f"--allocator {method.allocator}, which reads no curves"
            opt.refuse_useless(context, beside, option_names(CurveChoice))
        if self.curves is not None and self.curve_rounds == 1:
            beside = f"--curves {self.curves} and --curve-rounds 1, with which nothing is measured"
            opt.refuse_useless(context, beside, ("curve_samples",))
        _ = self.rounds(method)

    def read(self) -> KnownCurves | None:
        """The curves of the file, if one is given."""
        return None if self.curves is None else KnownCurves(self.curves, read_curves(self.curves))

    def rounds(self, method: Method, batch_size: int = CurveOptions().batch_size) -> CurveRounds:
        """These options for the library."""
        options = CurveOptions(batch_size=batch_size)
        return CurveRounds(self.curve_rounds, self.curve_samples, options, method.allocator)

    def rounds_of(self, method: Method, plan: PruningPlan | None) -> CurveRounds | None:
        """These options for an estimate; None where nothing is measured."""
        return self.rounds(method) if method.measures and plan is None else None

    def plan(
        self, job: PruneJob, one: Scores, make: Callable[..., PruningPlan], part: Path, known: KnownCurves | None
    ) -> tuple[PruningPlan, list[Curves]]:
        """Measure (or take the first round from a file) and plan; without curves where the allocator reads none."""
        if not job.method.measures:
            return make(), []
        measures = known is None or self.curve_rounds > 1
        stats = job.stats(part) if measures and job.method.curve_statistics else None
        asked = self.rounds(job.method, job.text.batch_size)
        measure = partial(numbered_round, job, one, stats, asked, part)

        def curves(number: int, plan: PruningPlan | None) -> Curves:
            first = None if known is None or plan is not None else known.of_this_model(job)
            return first or measure(number, plan)

        return solve_in_rounds(curves, make, asked.rounds)


@dataclass(frozen=True, slots=True)
class KnownCurves:
    """Curves of a file."""

    path: Path
    curves: Curves

    def of_this_model(self, job: PruneJob) -> Curves:
        """The curves; raises UsageError when they are of other weights."""
        if self.curves.facts.get("model") != job.model_hash:
            raise UsageError(
                f"{self.path} was measured on other weights than those of {job.loaded.source.model_id} (or in another "
                "dtype). Measure this model, or give the same --dtype."
            )
        return self.curves


def numbered_round(
    job: PruneJob,
    scores: Scores,
    stats: Mapping[FFNSite, ChannelStats] | None,
    asked: CurveRounds,
    part: Path,
    number: int,
    plan: PruningPlan | None,
) -> Curves:
    """Measure one round, around a plan if one is given, on a part of the calibration text; it can be interrupted."""
    path = part / f"curves_{number}.json"
    discard_damaged(job.reporter, path, read_state)
    options = replace(asked.options, checkpoint=path)
    what = "measure curves" if plan is None else "measure curves around the solution"
    with job.reporter.task(what, "cuts") as update:
        windows = asked.windows(job.windows)
        return measure_round(job.loaded.model, scores, stats, windows, plan, options=options, on_cut=update)


def keep_beside(found: Sequence[Curves], plan: PruningPlan, job: PruneJob, out: Path) -> None:
    """Keep the curves of a pruning in its checkpoint, if it is a folder."""
    if found and out.is_dir():
        write_curve_files(out, beside(found), found, plan, job)


def beside(found: Sequence[Curves]) -> list[str]:
    """Names of the curves of a pruning."""
    return [f"{NAME}_{i}" for i in range(1, len(found) + 1)]


def tell_curves(out: Path, names: Sequence[str], job: PruneJob) -> None:
    """Say where curves are; a format of one file has no place for them."""
    if names and out.is_dir():
        job.reporter.say(f"curves in {', '.join(str(out / f'{name}.csv') for name in names)}")
    elif names:
        job.reporter.say(f"note: the curves are not kept beside {out}, a single file; `ffnscope curves` writes them")


def write_curve_files(
    folder: Path, names: Sequence[str], found: Sequence[Curves], plan: PruningPlan | None, job: PruneJob
) -> None:
    """Write curves as safetensors, CSV and, where matplotlib is installed, PNG; the last ones with a plan's widths."""
    draws = importlib.util.find_spec("matplotlib") is not None
    for name, one in zip(names, found, strict=True):
        rows = one.rows(plan if one is found[-1] else None)
        write_curves(folder / f"{name}.safetensors", one)
        write_csv(folder / f"{name}.csv", rows)
        if draws:
            from ffnscope.report.curve_plots import plot_curves

            title = f"{job.loaded.source.model_id}, {one.facts['tokens']:,} tokens of {one.facts['source']}"
            plot_curves(rows, folder / f"{name}.png", title)
    if not draws:
        job.reporter.say("note: no plot of the curves; that needs matplotlib (pip install 'ffnscope[plots]')")
