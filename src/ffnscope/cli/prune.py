"""The command prune: score -> plan -> reconstruct -> slice -> save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ffnscope.apply.folder import sweep
from ffnscope.apply.method import Method
from ffnscope.apply.reconstruction import Reconstruction
from ffnscope.apply.record import write_record
from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT
from ffnscope.cli.curve_options import CurveChoice, KnownCurves, beside, keep_beside, tell_curves
from ffnscope.cli.files import Out, Overwrite, check_output, read_metric, tell_changes, working_folder
from ffnscope.cli.groups import grouped, option_names
from ffnscope.cli.prune_choices import MethodChoice, PlanChoice, SaveOptions
from ffnscope.cli.prune_estimate import print_prune_estimate
from ffnscope.cli.prune_from import loading_of, model_of, open_record, text_of
from ffnscope.cli.prune_job import PruneJob
from ffnscope.errors import UsageError
from ffnscope.ffn.streamed import wait_in
from ffnscope.io import read_plan
from ffnscope.plan.allocate import check_budget
from ffnscope.plan.curves import Curves
from ffnscope.report.error_table import print_profile
from ffnscope.run.machine import library_bytes
from ffnscope.run.progress import Reporter
from ffnscope.run.saving import Saving
from ffnscope.run.texts import SHIPPED_TEXTS, held_out_split
from ffnscope.types import Budget, PruningPlan, Scores

WINDOWS, LENGTH = 128, 256
"""Of the calibration of a reconstruction: as many tokens as without, in more places of the text."""
OptionalModel = Annotated[
    str | None, typer.Argument(help="Hub id, directory, .gguf file, or package:DIST; with --from that of RUN.")
]
_TEXT = option_names(opt.TextChoice)
_OF_SCORES = (*(name for name in option_names(opt.MetricOptions) if name != "module"), "split", "rounds")
_OF_WIDTHS = ("multiple_of", "min_keep", "protect_fraction", *option_names(CurveChoice))
_OF_PLAN = ("method", "metric", "module", "scores", "allocator", "keep_statistics", *_OF_WIDTHS, *_OF_SCORES)


@dataclass(frozen=True, slots=True)
class Known:
    """What files of earlier commands decide already: a plan, or scores with the hash of their weights; or curves."""

    plan: PruningPlan | None = None
    scores: tuple[Scores, str] | None = None
    curves: KnownCurves | None = None

    def of_this_model(self, path: Path | None, job: PruneJob) -> Scores | None:
        """The scores, if any; raises UsageError when they are of other weights."""
        if job.record is not None:
            job.record.check_model(job.model_hash)
            return job.record.scores
        return None if self.scores is None else of_this_model(*self.scores, path, job)


@grouped
def prune_command(
    *,
    context: typer.Context,
    model: OptionalModel = None,
    out: Out,
    wanted: PlanChoice,
    choice: MethodChoice,
    measured: CurveChoice,
    form: SaveOptions,
    evaluate: Annotated[bool, typer.Option(help="Measure perplexity before and after on held-out text.")] = True,
    text: opt.TextChoice,
    needs: opt.MetricOptions,
    loading: opt.Loading,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and how long it would take.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Prune and save: score -> plan -> reconstruct -> slice -> OUT, a checkpoint, or a DeciLM or GGUF export.

    With a reconstruction the calibration has 128 windows of 256 tokens, a mixture of all shipped texts, unless you say
    otherwise; 32 of them run backward where the metric needs it. With --from, nothing is calibrated: scores, text and
    what is not given are those of an earlier result. An interrupted call goes on.
    """
    record = open_record(context, wanted.run, choice.metric, text, form.keep_statistics) if wanted.run else None
    method = choice.chosen(context, record and record.method)
    if record is not None:
        record.check_method(method)
        text, loading = text_of(context, text, record), loading_of(context, loading, record)
    else:
        text = mixed(context, text, method)
    refits = method.reconstruct != "none"
    _refuse_useless(context, wanted, not evaluate and not refits, refits)
    check_output(out, overwrite)
    saving = form.saving(context, out, overwrite)
    budget = wanted.budget(context, record)
    wanted.check(method, budget, saving)
    measured.check(context, method, wanted.plan)
    held_out = _held_out(text) if evaluate else None
    decided = wanted.plan or wanted.scores or wanted.run
    inputs = None if decided else needs.inputs(context, [method.metric], text.seed)
    if record is None and (inputs or refits or method.measures):
        text.check_calibration()
    plan = read_plan(wanted.plan) if wanted.plan else None
    known = Known(plan, read_metric(wanted.scores, method.metric) if wanted.scores else None, measured.read())
    reporter = Reporter()
    libraries = library_bytes() if dry_run else 0  # before the model is loaded
    loaded = loading.open(reporter, model_of(model, record), only_estimate=dry_run)
    saving.check_model(loaded)
    chosen = calibration_of(context, text, method)
    job = PruneJob(loaded, method, chosen, inputs, reporter, record, form.keep_statistics)
    scores = known.of_this_model(wanted.scores, job)
    job.check_sites(plan, scores)
    if plan is None:
        check_budget(job.asked.sites if scores is None else scores.sites, budget)
    if dry_run:
        rounds = measured.rounds_of(method, plan)
        print_prune_estimate(job, budget, held_out.held_out(loaded) if held_out else None, libraries, OUT, rounds)
        return
    _start(_Asked(wanted, measured, known, budget, saving, text, held_out), job, scores)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the options say, once they are checked."""

    wanted: PlanChoice
    measured: CurveChoice
    known: Known
    budget: Budget
    saving: Saving
    text: opt.TextChoice
    held_out: opt.TextChoice | None


def _start(asked: _Asked, job: PruneJob, scores: Scores | None) -> None:
    """Do all of it in a folder from which the same call goes on."""
    out = asked.saving.out
    with working_folder(out.with_name(f".{out.name}.prune.part")) as part:
        sweep(out.parent, out.name)
        check_output(out, asked.saving.overwrite)  # of another process, since the first check
        wait_in(job.loaded.model, part)
        tell_changes(part, job.hashes, job.reporter)
        _carry_out(asked, job, scores, part)


def _carry_out(asked: _Asked, job: PruneJob, scores: Scores | None, part: Path) -> None:
    """Score and plan unless that is done, reconstruct, measure and save, with a record for another cut."""
    plan, saving, wanted = asked.known.plan, asked.saving, asked.wanted
    curves: list[Curves] = []
    if plan is None:
        scores = job.score(part) if scores is None else scores
        one = replace(scores, facts={**scores.facts, "model_id": job.loaded.source.model_id})
        make = partial(wanted.make, one, asked.budget, job, part)
        plan, curves = asked.measured.plan(job, one, make, part, asked.known.curves)
    kept = None
    if scores is not None and saving.form != "gguf":
        protected = wanted.protected(scores, job.record)
        kept = job.keep(scores, plan.budget, protected, asked.held_out or asked.text, part)

    def add(folder: Path) -> None:
        keep_beside(curves, plan, job, folder)
        if kept is not None:
            write_record(folder, kept)

    _finish(asked, job, plan, part, add)
    tell_curves(saving.out, beside(curves), job)


def _finish(asked: _Asked, job: PruneJob, plan: PruningPlan, part: Path, add: Callable[[Path], None]) -> None:
    """Reconstruct, measure and save, with what ``add`` writes beside the weights."""
    saving, held_out = asked.saving, asked.held_out
    saving.check_plan(job.loaded, plan, job.reporter)
    pruned = job.reconstruct(plan, part)
    rows = job.compare(pruned, held_out, part) if held_out else []
    if isinstance(pruned, Reconstruction):
        print_profile(pruned, OUT)
    saving = replace(saving, unfinished=part / "written", model_hash=job.model_hash)
    saving.prune_and_save(job.loaded, pruned, {row.label: row.results for row in rows}, job.reporter, add)


def mixed(context: typer.Context, text: opt.TextChoice, method: Method) -> opt.TextChoice:
    """The text, and for a reconstruction all shipped texts mixed, unless the user named one."""
    if method.reconstruct == "none" or any(opt.given(context, name) for name in ("text", "mix", "split")):
        return text
    return replace(text, mix=[name for name in SHIPPED_TEXTS if name != text.text])


def calibration_of(context: typer.Context, text: opt.TextChoice, method: Method) -> opt.TextChoice:
    """The text to calibrate on: more and shorter windows for a reconstruction, unless the user gave other numbers."""
    if method.reconstruct == "none":
        return text
    wanted = {"num_samples": WINDOWS, "max_length": LENGTH}
    return replace(text, **{name: n for name, n in wanted.items() if not opt.given(context, name)})


def _refuse_useless(context: typer.Context, wanted: PlanChoice, reads_no_text: bool, refits: bool) -> None:
    """Refuse options that would silently do nothing."""
    for option, value, useless in (
        ("plan", wanted.plan, _OF_PLAN),
        ("scores", wanted.scores, _OF_SCORES),
        ("from", wanted.run, ()),
    ):
        if value is None:
            continue
        if reads_no_text:
            opt.refuse_useless(context, f"--{option} {value} and --no-evaluate, which read no text", _TEXT)
        unused = [name for name in useless if name != "split" or not refits]
        opt.refuse_useless(context, f"--{option} {value}, which already decides that", unused)


def _held_out(text: opt.TextChoice) -> opt.TextChoice:
    """The text to measure on; raises UsageError where it is not known which part is held out."""
    for name in text.names:
        if held_out_split(name) is None:
            raise UsageError(
                f"{name} has no known held-out split to measure on. Pass --no-evaluate, and use `ffnscope eval` with "
                "another text."
            )
    if text.split == held_out_split(text.text):
        raise UsageError(
            f"--split {text.split} is the held-out split of {text.text}, on which the result is measured. Calibrate on "
            "another, or pass --no-evaluate."
        )
    found = replace(text, split=None)
    found.check_held_out()
    return found


def of_this_model(scores: Scores, model_hash: str, path: Path | None, job: PruneJob) -> Scores:
    """The scores of a file; raises UsageError when they are of other weights."""
    if model_hash != job.model_hash:
        raise UsageError(
            f"{path} was made from other weights than those of {job.loaded.source.model_id} (or in another dtype). "
            "Score this model, or give the same --dtype."
        )
    return scores
