"""The command curves: what single FFNs cost when they are cut, measured and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ffnscope.analyze.curves import CurveOptions
from ffnscope.analyze.measured import WINDOWS, CurveRounds
from ffnscope.apply.method import Method
from ffnscope.calibrate.text import check_text
from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT
from ffnscope.cli.curve_options import numbered_round, tell_curves, write_curve_files
from ffnscope.cli.files import Out, Overwrite, check_folder_output, read_metric, tell_changes, unfinished
from ffnscope.cli.groups import grouped, option_names
from ffnscope.cli.prune import of_this_model
from ffnscope.cli.prune_estimate import print_curves_estimate
from ffnscope.cli.prune_job import PruneJob
from ffnscope.cli.prune_texts import calibration_of
from ffnscope.io import read_plan
from ffnscope.run.machine import library_bytes
from ffnscope.run.progress import Reporter

UNFINISHED = "curves.part"
NAME = "curves"


@grouped
def curves_command(
    *,
    context: typer.Context,
    model: opt.Model,
    out: Out,
    metric: Annotated[str, typer.Option("--metric", "-m", help="Metric: the order of removal.")] = "scar_loss_proxy",
    scores: Annotated[Path | None, typer.Option(help="Use these scores instead of calibrating.")] = None,
    share: Annotated[
        list[float] | None, typer.Option(help="Kept share of the channels to measure; repeatable [0.75, 0.5, 0.25].")
    ] = None,
    refit: Annotated[bool, typer.Option(help="Refit what stays of every cut by least squares, in one shot.")] = True,
    around: Annotated[Path | None, typer.Option(help="Measure around this plan: all other FFNs are cut too.")] = None,
    curve_samples: Annotated[int, typer.Option(help="Calibration windows on which curves are measured.")] = WINDOWS,
    text: opt.TextChoice,
    needs: opt.MetricOptions,
    loading: opt.Loading,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and how long it would take.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure the rise of the KL when single FFNs are cut: OUT/curves.safetensors, .csv and .png.

    `prune --allocator measured --curves OUT/curves.safetensors` chooses widths by them, at any sparsity. With a refit
    the calibration is that of `prune --method best`: a mixture of all shipped texts, 128 windows of 256 tokens or as
    many as 4 tokens per channel need, unless you say otherwise. An interrupted call goes on.
    """
    check_folder_output(out, overwrite, UNFINISHED)
    if around is not None:
        opt.refuse_useless(context, f"--around {around}, whose widths and 20 % about them are measured", ("share",))
    options = CurveOptions(tuple(sorted(share, reverse=True)) if share else CurveOptions().shares, text.batch_size)
    asked = CurveRounds(1, curve_samples, options)
    method = Method(metric, "measured", "one_shot" if refit else "none")
    sample = calibration_of(context, text, method)
    check_text(sample.source)
    if scores is not None:
        opt.refuse_useless(context, f"--scores {scores}, which already decides that", option_names(opt.MetricOptions))
    inputs = None if scores else needs.inputs(context, [metric], text.seed)
    known = read_metric(scores, metric) if scores else None
    plan = None if around is None else read_plan(around)
    reporter = Reporter()
    libraries = library_bytes() if dry_run else 0  # before the model is loaded
    loaded = loading.open(reporter, model, only_estimate=dry_run)
    job = PruneJob(loaded, method, sample, inputs, reporter)
    found = None if known is None else of_this_model(*known, scores, job)
    job.check_sites(None, found)
    if dry_run:
        print_curves_estimate(job, asked, libraries, OUT)
        return
    with unfinished(out / UNFINISHED) as part:
        tell_changes(part, {**job.hashes, "the calibration text": job.windows.hash}, reporter)
        one = job.score(part) if found is None else found
        stats = job.stats(part) if refit else None
        curves = numbered_round(job, one, stats, asked, part, 1, plan)
        write_curve_files(out, [NAME], [curves], plan, job)
        tell_curves(out, [NAME], job)
