"""``ffnscope rank --validate``: which metric ranks the channels of this model best, measured."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ffnscope.analyze.ablation import ablate_channels
from ffnscope.analyze.levels import calibrate_all
from ffnscope.analyze.memory import calibration_bytes
from ffnscope.analyze.paths import strongest_paths, top_nodes
from ffnscope.analyze.question import Question
from ffnscope.analyze.sample import ChannelSample
from ffnscope.analyze.validate import (
    Validation,
    ValidationOptions,
    computable_metrics,
    join_validation,
    label,
    stratifier,
    validation_plans,
    with_floor,
)
from ffnscope.calibrate.collect import PassOptions, weights_hash
from ffnscope.calibrate.windows import Windows
from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT
from ffnscope.cli.files import check_folder_output, tell_changes, unfinished
from ffnscope.cli.validate_estimate import print_validation_estimate
from ffnscope.errors import FFNScopeError, UsageError
from ffnscope.ffn.load import LoadedModel
from ffnscope.io import read_state, write_csv, write_json, write_text
from ffnscope.plan.build import check_allocator_name
from ffnscope.registry import METRICS
from ffnscope.report.validation_table import print_validation, validation_facts, validation_markdown
from ffnscope.run.machine import library_bytes
from ffnscope.run.progress import Reporter
from ffnscope.run.steps import announce, compare_with_dense, discard_damaged
from ffnscope.run.texts import held_out_split
from ffnscope.scoring import naming_weights
from ffnscope.types import Scores

UNFINISHED = "validate.part"
"""Folder in an output that is not finished: what has been measured so far."""


@dataclass(frozen=True, slots=True)
class ValidateOptions:
    """What a validation measures.

    Raises:
        UsageError: an impossible sample, sparsity or allocator.
    """

    validate: Annotated[
        bool, typer.Option("--validate", help="Measure which metric to trust: -m several, or leave out for all.")
    ] = False
    channels: Annotated[int, typer.Option(help="Channels to remove one at a time.")] = ChannelSample().n_channels
    sites: Annotated[int, typer.Option(help="FFNs that they come from.")] = ChannelSample().n_sites
    sparsity: Annotated[
        list[float] | None, typer.Option(help="Also prune by this fraction; repeatable; 0 for none [0.1 0.3 0.5].")
    ] = None
    allocator: Annotated[list[str] | None, typer.Option(help="For --sparsity; local and global without.")] = None
    held_out: Annotated[str | None, typer.Option(help="Text to measure on, if not the test split of --text.")] = None
    held_out_samples: Annotated[int, typer.Option(help="Token windows of the text to measure on.")] = 8
    plots: Annotated[bool, typer.Option("--plots", help="Also draw, into OUT/plots.")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and how long it would take.")] = False

    def __post_init__(self) -> None:
        _ = self.asked(1)  # refuses what is impossible now
        if self.held_out_samples < 1:
            raise UsageError(f"--held-out-samples must be at least 1; got {self.held_out_samples}.")
        for name in self.allocator or ():
            check_allocator_name(name)

    def asked(self, batch_size: int) -> ValidationOptions:
        """Translate for `validate`."""
        default = ValidationOptions()
        return ValidationOptions(
            ChannelSample(self.channels, self.sites),
            default.sparsities if self.sparsity is None else tuple(s for s in self.sparsity if s != 0),
            default.allocators if self.allocator is None else tuple(dict.fromkeys(self.allocator)),
            batch_size,
        )

    def text(self, calibration: opt.TextChoice) -> opt.TextChoice:
        """The held-out text; raises UsageError unless there is one that is not calibrated on."""
        name = self.held_out or calibration.text
        mix = calibration.mix if self.held_out is None else None
        chosen = replace(calibration, text=name, split=None, mix=mix, num_samples=self.held_out_samples)
        if name in calibration.names:
            for one in chosen.names:
                if held_out_split(one) is None:
                    raise UsageError(
                        f"{one} has no known held-out split to measure on. Name another text with --held-out."
                    )
            split = held_out_split(name)
            if calibration.split == split:
                raise UsageError(
                    f"--split {split} is the held-out split of {name}, on which is measured. Calibrate on another, or "
                    "name another text with --held-out."
                )
        chosen.check_held_out()
        return chosen

    @staticmethod
    def names() -> tuple[str, ...]:
        """The options that have no meaning without --validate."""
        return tuple(field.name for field in fields(ValidateOptions) if field.name != "validate")


@dataclass(frozen=True, slots=True)
class Measurement:
    """A validation that is ready to run.

    Attributes:
        asked: the metrics, and where.
        skipped: metric -> why it is left out.
        named: whether the metrics were named; then none of them may fail.
        calibration: text for the scores.
        held_out: text to measure on.
        options: what is measured.
    """

    asked: Question
    skipped: Mapping[str, str]
    named: bool
    calibration: Windows
    held_out: Windows
    options: ValidationOptions


def validate_command(
    context: typer.Context,
    model: str | None,
    named: list[str] | None,
    out: Path | None,
    *,
    tracked: list[str] | None,
    text: opt.TextChoice,
    needs: opt.MetricOptions,
    checks: ValidateOptions,
    loading: opt.Loading,
    overwrite: bool,
) -> None:
    """Validate the metrics named, or all that can be computed, and print the tables; see `rank_command`."""
    if model is None:
        raise UsageError("--validate needs a model, whose channels are removed one at a time.")
    if checks.plots and out is None:
        raise UsageError("--plots would do nothing without a folder to draw into; add --out FOLDER.")
    if out is not None:
        check_folder_output(out, overwrite, UNFINISHED)
    if checks.plots and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plots needs matplotlib, which is not installed: pip install 'ffnscope[plots]'.")
    texts = text, checks.text(text)
    text.check_calibration()
    rules = [METRICS.get(name) for name in METRICS.names()]
    every = [rule.name for rule in rules if "reference" not in rule.inputs or needs.reference is not None]
    inputs = needs.inputs(context, named or every, text.seed)
    reporter = Reporter()
    libraries = library_bytes() if checks.dry_run else 0  # before the model is loaded
    loaded = loading.open(reporter, model, only_estimate=checks.dry_run)
    one = prepare(loaded, inputs.question(loaded, tracked), texts, checks, named=bool(named))
    if checks.dry_run:
        windows = one.calibration, one.held_out
        print_validation_estimate(loaded, one.asked, windows, one.options, libraries, OUT)
        for metric, why in one.skipped.items():
            OUT.print(f"no row for {metric}: {why}", highlight=False, markup=False)
        return
    found = run_validation(one, reporter, out, plots=checks.plots)
    print_validation(found, OUT)
    if out is not None:
        reporter.say(f"validation of {len(found.qualities)} metrics in {out}")


def prepare(
    loaded: LoadedModel,
    asked: Question,
    texts: tuple[opt.TextChoice, opt.TextChoice],
    checks: ValidateOptions,
    *,
    named: bool,
) -> Measurement:
    """Cut the texts (to calibrate, to measure), and leave out metrics that were not named and cannot be computed."""
    why: dict[str, str] = {}
    if not named:
        names, why = computable_metrics(asked.sites, asked.rule, has_reference=asked.reference is not None)
        asked = replace(asked, params={n: p for n, p in asked.params.items() if n in names})
    calibration, held_out = texts[0].calibration(loaded), texts[1].held_out(loaded)
    return Measurement(asked, why, named, calibration, held_out, checks.asked(texts[0].batch_size))


def run_validation(one: Measurement, reporter: Reporter, out: Path | None, *, plots: bool) -> Validation:
    """Score, ablate and prune; with a folder, write validation.json, .csv, .md and plots there. It can be continued."""
    with contextlib.nullcontext() if out is None else unfinished(out / UNFINISHED) as part:
        options = PassOptions(batch_size=one.options.batch_size)
        if part is not None:
            known = weights_hash(one.asked.model)
            texts = {"the calibration text": one.calibration.hash, "the held-out text": one.held_out.hash}
            tell_changes(part, {"the model": known, **texts}, reporter)
            sums = part / "calibrate.safetensors"
            for path in part.glob(f"*{sums.name}"):
                discard_damaged(reporter, path)
            options = replace(options, checkpoint=sums, keep_checkpoint=True, model_hash=known)
        found = _measure(one, reporter, part, options)
        if out is not None:
            write_json(out / "validation.json", validation_facts(found))
            write_csv(out / "validation.csv", found.rows())
            write_text(out / "validation.md", validation_markdown(found))
            if plots:
                _plot(found, one.asked.model, out / "plots")
    return found


def _measure(one: Measurement, reporter: Reporter, part: Path | None, passes: PassOptions) -> Validation:
    model, options = one.asked.model, one.options
    scores, failed = _scores(one, reporter, passes)
    scores = with_floor(model, scores)
    states = {name: part / f"{name}.json" if part else None for name in ("ablate", "prune")}
    for path in states.values():
        if path is not None:
            discard_damaged(reporter, path, read_state)
    channels = options.sample.draw(stratifier(scores))
    with reporter.task("ablate", "tokens") as update:
        size: Any = {"batch_size": options.batch_size, "state": states["ablate"]}
        ablation = ablate_channels(model, channels, one.held_out, **size, on_tokens=update)
    plans = validation_plans(scores, options)
    named = {label(key): plan for key, plan in plans.items()}
    rows = (
        compare_with_dense(reporter, model, named, one.held_out, options.batch_size, states["prune"]) if named else []
    )
    found = join_validation(scores, ablation, plans, rows, one.held_out)
    return replace(found, skipped={**one.skipped, **failed})


def _scores(one: Measurement, reporter: Reporter, options: PassOptions) -> tuple[dict[str, Scores], dict[str, str]]:
    """Scores of every metric, and the reasons of those that failed; a metric that was named must not fail."""
    asked = one.asked
    given: Any = {"sites": asked.sites, "rule": asked.rule, "options": options}
    announce(reporter, calibration_bytes(asked.model, one.calibration, asked.params, **given))
    found: dict[str, Scores] = {}
    failed: dict[str, str] = {}
    with reporter.task("calibrate", "tokens") as update, naming_weights(asked.model):
        stats, core = calibrate_all(asked.model, one.calibration, asked.params, **given, on_batch=update)
        for name in asked.params:
            try:
                found |= asked.scores(stats, core, metrics=[name])
            except FFNScopeError as error:
                if one.named:
                    raise
                failed[name] = str(error)
    return found, failed


def _plot(found: Validation, model: Any, folder: Path) -> None:
    from ffnscope.report.layered_graph import plot_layered_graph
    from ffnscope.report.validation_plots import plot_validation

    plot_validation(found, folder, found.source)
    best = found.qualities[0].metric
    nodes = top_nodes(found.scores[best])
    every = [node for own in nodes.values() for node in own]
    plot_layered_graph(
        every, strongest_paths(model, nodes), folder / "paths.png", f"scores: {best}; strengths: weights"
    )
