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
from ffnscope.apply.record import PruningRecord, write_record
from ffnscope.calibrate.text import check_text
from ffnscope.calibrate.windows import Windows
from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT
from ffnscope.cli.curve_options import CurveChoice, KnownCurves, beside, keep_beside, tell_curves
from ffnscope.cli.files import Out, Overwrite, check_output, read_metric, tell_changes, working_folder
from ffnscope.cli.groups import grouped, option_names
from ffnscope.cli.prune_choices import MethodChoice, PlanChoice, SaveOptions
from ffnscope.cli.prune_estimate import print_prune_estimate
from ffnscope.cli.prune_from import loading_of, model_of, open_record
from ffnscope.cli.prune_job import PruneJob
from ffnscope.cli.prune_texts import HeldOutChoice, PruneTexts, texts_again, texts_of
from ffnscope.errors import UsageError
from ffnscope.ffn.streamed import wait_in
from ffnscope.io import read_plan
from ffnscope.plan.allocate import check_budget
from ffnscope.plan.curves import Curves
from ffnscope.report.error_table import print_profile
from ffnscope.run.machine import library_bytes
from ffnscope.run.progress import Reporter
from ffnscope.run.saving import Saving
from ffnscope.types import Budget, PruningPlan, Scores

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
    measured_on: HeldOutChoice,
    text: opt.TextChoice,
    needs: opt.MetricOptions,
    loading: opt.Loading,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and how long it would take.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Prune and save: score -> plan -> reconstruct -> slice -> OUT, a checkpoint, or a DeciLM or GGUF export.

    With a reconstruction the calibration has 128 windows of 256 tokens, or as many as give 4 tokens per channel, of a
    mixture of all shipped texts, unless you say otherwise; up to 128 run backward where the metric needs it. With
    --from, nothing is calibrated: scores, text and what is not given are those of an earlier result. An interrupted
    call goes on.
    """
    record = open_record(context, wanted.run, choice.metric, text, form.keep_statistics) if wanted.run else None
    method = choice.chosen(context, record and record.method)
    if record is not None:
        record.check_method(method)
        loading = loading_of(context, loading, record)
    refits = method.reconstruct != "none"
    _refuse_useless(context, wanted, not evaluate and not refits, refits)
    check_output(out, overwrite)
    saving = form.saving(context, out, overwrite)
    budget = wanted.budget(context, record)
    wanted.check(method, budget, saving)
    measured.check(context, method, wanted.plan)
    measured_on.check(context, evaluates=evaluate)
    texts = _texts(context, text, method, record, measured_on, evaluates=evaluate)
    decided = wanted.plan or wanted.scores or wanted.run
    inputs = None if decided else needs.inputs(context, [method.metric], text.seed)
    if record is None and (inputs or refits or method.measures):
        check_text(texts.calibration.source)
    plan = read_plan(wanted.plan) if wanted.plan else None
    known = Known(plan, read_metric(wanted.scores, method.metric) if wanted.scores else None, measured.read())
    reporter = Reporter()
    libraries = library_bytes() if dry_run else 0  # before the model is loaded
    loaded = loading.open(reporter, model_of(model, record), only_estimate=dry_run)
    saving.check_model(loaded)
    job = PruneJob(loaded, method, texts.calibration, inputs, reporter, record, form.keep_statistics)
    scores = known.of_this_model(wanted.scores, job)
    job.check_sites(plan, scores)
    if plan is None:
        check_budget(job.asked.sites if scores is None else scores.sites, budget, method.allocator)
    job.check_text()
    held_out = texts.held_out.windows(loaded) if texts.held_out else None  # what is wrong with them shows now
    if dry_run:
        rounds = measured.rounds_of(method, plan)
        print_prune_estimate(job, budget, held_out, libraries, OUT, rounds)
        return
    _start(_Asked(wanted, measured, known, budget, saving, texts, held_out), job, scores)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the options say, once they are checked; ``held_out`` are the windows of the held-out text, if any."""

    wanted: PlanChoice
    measured: CurveChoice
    known: Known
    budget: Budget
    saving: Saving
    texts: PruneTexts
    held_out: Windows | None


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
        kept = job.keep(scores, plan.budget, protected, asked.texts.told, part)

    def add(folder: Path) -> None:
        keep_beside(curves, plan, job, folder)
        if kept is not None:
            write_record(folder, kept)

    _finish(asked, job, plan, part, add)
    tell_curves(saving.out, beside(curves), job)


def _finish(asked: _Asked, job: PruneJob, plan: PruningPlan, part: Path, add: Callable[[Path], None]) -> None:
    """Reconstruct, measure and save, with what ``add`` writes beside the weights."""
    saving, sample = asked.saving, asked.texts.held_out
    saving.check_plan(job.loaded, plan, job.reporter)
    pruned = job.reconstruct(plan, part)
    rows = job.compare(pruned, asked.held_out, sample.batch_size, part) if sample and asked.held_out else []
    if isinstance(pruned, Reconstruction):
        print_profile(pruned, OUT)
    saving = replace(saving, unfinished=part / "written", model_hash=job.model_hash)
    saving.prune_and_save(job.loaded, pruned, {row.label: row.results for row in rows}, job.reporter, add)


def _texts(
    context: typer.Context,
    text: opt.TextChoice,
    method: Method,
    record: PruningRecord | None,
    measured_on: HeldOutChoice,
    *,
    evaluates: bool,
) -> PruneTexts:
    if record is None:
        return texts_of(context, text, method, measured_on.source, evaluates=evaluates)
    return texts_again(context, text, record, measured_on.source, evaluates=evaluates)


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


def of_this_model(scores: Scores, model_hash: str, path: Path | None, job: PruneJob) -> Scores:
    """The scores of a file; raises UsageError when they are of other weights."""
    if model_hash != job.model_hash:
        raise UsageError(
            f"{path} was made from other weights than those of {job.loaded.source.model_id} (or in another dtype). "
            "Score this model, or give the same --dtype."
        )
    return scores
