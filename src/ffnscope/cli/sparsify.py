"""The command sparsify: which channels a token needs, calibrated to a target, as a card and a page."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from ffnscope.calibrate.collect import weights_hash
from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT
from ffnscope.cli.files import Out, Overwrite, check_folder_output, tell_changes, unfinished
from ffnscope.cli.groups import grouped
from ffnscope.cli.sparse_options import MAX_TRACES, MaxTraces, RuleChoice, trace_bytes
from ffnscope.errors import UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.report.card_page import write_card_page
from ffnscope.report.card_table import print_card
from ffnscope.run.machine import library_bytes
from ffnscope.run.progress import Reporter
from ffnscope.run.seconds import seconds_per_token
from ffnscope.run.sparse_estimate import card_lines, card_work, print_sparse_estimate, probe_card
from ffnscope.run.sparse_steps import CardJob, draw_card_plots, write_curve
from ffnscope.run.switches import bounds_of
from ffnscope.sparse.card import WantedChannels
from ffnscope.sparse.card_curve import check_densities
from ffnscope.sparse.card_files import write_card
from ffnscope.sparse.card_options import (
    CardOptions,
    CardTarget,
    Certify,
    ParameterTarget,
    check_offered,
    parse_target,
    wanted_channels,
)
from ffnscope.sparse.rivals import USUAL, check_rivals
from ffnscope.sparse.rule import SelectionRule

UNFINISHED = "sparsify.part"
CURVE_FILES = ("curve.csv", "curve.json", "curve.png", "curve_bytes.png")


@dataclass(frozen=True, slots=True)
class CardChoice:
    """How the target is met, and what is promised."""

    certify: Annotated[
        str | None,
        typer.Option(help="Promise the target for new documents: risk_control, split_conformal or learn_then_test."),
    ] = None
    failure: Annotated[float, typer.Option(help="Of split_conformal and learn_then_test.")] = 0.1
    allocation: Annotated[
        str, typer.Option(help="uniform, or by curves of damage: relative_error, fisher or measured.")
    ] = "uniform"
    floor: Annotated[float, typer.Option(help="Lowest density of the first and last layer in an allocation.")] = 0.3
    wanted: Annotated[
        float, typer.Option(help="Recall is of the fewest channels that miss this share; 0: of all that are not zero.")
    ] = WantedChannels().share
    max_traces: MaxTraces = MAX_TRACES

    def options(self, context: typer.Context, target: CardTarget, batch_size: int) -> CardOptions:
        """Check these options; raises UsageError."""
        if self.certify is None:
            opt.refuse_useless(context, "no --certify", ("failure",))
        if self.allocation == "uniform":
            opt.refuse_useless(context, "--allocation uniform", ("floor",))
        certify = None if self.certify is None else Certify(self.certify, self.failure)  # type: ignore[arg-type]
        found = CardOptions(
            wanted_channels(self.wanted),
            certify,
            self.allocation,  # type: ignore[arg-type]
            self.floor,
            batch_size=batch_size,
        )
        check_offered(target, found)
        return found


@dataclass(frozen=True, slots=True)
class CurveChoice:
    """The densities at which the perplexity is measured, and what stands beside the rule there."""

    curve: Annotated[
        list[float] | None,
        typer.Option("--curve", help="Density to measure the perplexity at, by this rule and others; repeatable."),
    ] = None
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="ROW",
            help="Which others: `ffnscope predictors list` has their names; repeatable. Without, the oracle, one "
            "selection for all tokens, and 4-bit dense FFNs.",
        ),
    ] = None

    def check(self, context: typer.Context, rule: SelectionRule) -> tuple[tuple[float, ...], tuple[str, ...]]:
        """Densities and rows; raises UsageError for what cannot be measured."""
        densities, rivals = tuple(self.curve or ()), tuple(self.against or USUAL)
        check_densities(rule, densities)
        if not densities:
            opt.refuse_useless(context, "no --curve", ("against",))
        check_rivals(rivals, densities, prompt=rule.prompt)
        return densities, rivals


@grouped
def sparsify_command(
    *,
    context: typer.Context,
    model: opt.Model,
    out: Out,
    target: Annotated[
        str,
        typer.Option(
            help="recall=, missed_mass=, density=, relative_error=, "
            "perplexity=+1%, bytes=50%, or the policy's parameter="
        ),
    ] = "recall=0.95",
    rule: RuleChoice,
    around: CurveChoice,
    choice: CardChoice,
    second: Annotated[str | None, typer.Option(help="Another text, to see what the card does there.")] = None,
    text: opt.TextChoice,
    loading: opt.Loading,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and how long it would take.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Calibrate which channels each token needs: OUT/card.json with its tensors, OUT/card.png and OUT/report.html.

    Documents of the text are split: predictors are made from some, the rule is calibrated on others, and the card tells
    what it does on the rest. With --curve also OUT/curve.csv, .json and their plots. An interrupted call goes on.
    `ffnscope.wrap_(model, ffnscope.read_card("OUT/card.json"))` decodes by the card.
    """
    check_folder_output(out, overwrite, UNFINISHED)
    asked, selection = parse_target(target), rule.rule()
    selection.identity()  # refuses files that are not there
    if isinstance(asked, ParameterTarget):
        selection.check_parameter(asked.value)
    densities, rivals = around.check(context, selection)
    options = choice.options(context, asked, text.batch_size)
    if second == text.text:
        raise UsageError(f"--second {second} is the text of the calibration. Name another, or leave it out.")
    other = None if second is None else replace(text, text=second, split=None, mix=None)
    text.check_calibration()
    if other is not None:
        other.check_held_out()
    limit, reporter = trace_bytes(choice.max_traces), Reporter()
    libraries = library_bytes() if dry_run else 0  # before the model is loaded
    loaded = loading.open(reporter, model, only_estimate=dry_run)
    held = None if other is None else other.held_out(loaded)
    sites, windows = find_sites(loaded.model), text.calibration(loaded)
    job = CardJob(loaded, sites, selection, asked, options, windows, held, densities, max_bytes=limit, against=rivals)
    job.check()
    if dry_run:
        probed = probe_card(job)
        lines = card_lines(job, probed, seconds_per_token(loaded.model, sites))
        print_sparse_estimate("sparsify", lines, bounds_of(loaded, sites, card_work(job, probed), libraries), OUT)
        return
    job = replace(job, model_hash=weights_hash(loaded.model))
    with unfinished(out / UNFINISHED) as part:
        tell_changes(part, job.hashes, reporter)
        _carry_out(job, out, part, reporter)


def _carry_out(job: CardJob, out: Path, part: Path, reporter: Reporter) -> None:
    card = job.fit(part, reporter)
    write_card(out / "card.json", card, overwrite=True)
    rows = job.curve(card, part, reporter)
    for old in CURVE_FILES:  # of a card that is replaced
        (out / old).unlink(missing_ok=True)
    if rows:
        write_curve(rows, [out / "curve.csv", out / "curve.json"])
    draw_card_plots(out, card, rows, job.windows.source)
    write_card_page(out / "report.html", card, rows)
    print_card(card, OUT, rows)
