"""The command sparsify: which channels a token needs, calibrated to a target, as a card and a page."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from ffnscope.calibrate.windows import Windows
from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT
from ffnscope.cli.files import Out, Overwrite, check_folder_output, unfinished
from ffnscope.cli.groups import grouped
from ffnscope.cli.sparse_options import RuleChoice, target_of, traced
from ffnscope.errors import UsageError
from ffnscope.ffn.load import LoadedModel
from ffnscope.report.card_plot import plot_card
from ffnscope.report.card_table import print_card, write_card_page
from ffnscope.run.progress import Reporter
from ffnscope.sparse.card_files import write_card
from ffnscope.sparse.card_options import CardOptions, CardTarget, CardTexts, Certify, check_offered
from ffnscope.sparse.fit import fit_card
from ffnscope.sparse.rule import SelectionRule
from ffnscope.sparse.tracing import traces_size

UNFINISHED = "sparsify.part"


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

    def options(self, context: typer.Context, target: CardTarget, batch_size: int) -> CardOptions:
        """Check these options; raises UsageError."""
        if self.certify is None:
            opt.refuse_useless(context, "no --certify", ("failure",))
        certify = None if self.certify is None else Certify(self.certify, self.failure)  # type: ignore[arg-type]
        found = CardOptions(certify=certify, allocation=self.allocation, batch_size=batch_size)  # type: ignore[arg-type]
        check_offered(target, found)
        return found


@dataclass(frozen=True, slots=True)
class _Job:
    loaded: LoadedModel
    rule: SelectionRule
    target: CardTarget
    options: CardOptions
    windows: Windows
    second: Windows | None
    reporter: Reporter


@grouped
def sparsify_command(
    *,
    context: typer.Context,
    model: opt.Model,
    out: Out,
    target: Annotated[
        str, typer.Option(help="recall=, missed_mass=, density=, relative_error= or perplexity=+1%.")
    ] = "recall=0.95",
    rule: RuleChoice,
    choice: CardChoice,
    second: Annotated[str | None, typer.Option(help="Another text, to see what the card does there.")] = None,
    text: opt.TextChoice,
    loading: opt.Loading,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run; nothing is computed.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Calibrate which channels each token needs: OUT/card.json with its tensors, OUT/card.png and OUT/report.html.

    Documents of the text are split: predictors are made from some, the rule is calibrated on others, and the card tells
    what it does on the rest. `ffnscope.wrap_(model, ffnscope.read_card("OUT/card.json"))` decodes by it. An interrupted
    call goes on.
    """
    check_folder_output(out, overwrite, UNFINISHED)
    asked, selection = target_of(target), rule.rule()
    options = choice.options(context, asked, text.batch_size)
    if second == text.text:
        raise UsageError(f"--second {second} is the text of the calibration. Name another, or leave it out.")
    other = None if second is None else replace(text, text=second, split=None, mix=None)
    text.check_calibration()
    if other is not None:
        other.check_held_out()
    reporter = Reporter()
    loaded = loading.open(reporter, model)
    held = None if other is None else other.held_out(loaded)
    job = _Job(loaded, selection, asked, options, text.calibration(loaded), held, reporter)
    if dry_run:
        _print_plan(job)
        return
    with unfinished(out / UNFINISHED) as part:
        _carry_out(job, out, part)


def _print_plan(job: _Job) -> None:
    size = sum(traces_size(job.loaded.model, text) for text in (job.windows, job.second) if text is not None)
    documents = len(job.windows.document.unique())
    reporter = job.reporter
    reporter.say(f"trace {job.windows.n_tokens:,} tokens of {documents} documents: {job.windows.source}")
    if job.second is not None:
        reporter.say(f"trace {job.second.n_tokens:,} tokens of a second text: {job.second.source}")
    reporter.say(f"traces take {size / 2**30:.2f} GiB of disk, removed at the end")
    reporter.say(f"fit {job.rule.predictor} and calibrate {job.rule.policy} to {job.target} in every FFN")
    reporter.say("dry run: nothing was computed")


def _carry_out(job: _Job, out: Path, part: Path) -> None:
    size = job.options.batch_size
    traces = traced(job.loaded, job.windows, part / "traces", "the text", job.reporter, size)
    other = job.second
    held = None if other is None else traced(job.loaded, other, part / "second", "the second", job.reporter, size)
    texts = CardTexts(job.windows, held, other)
    options = replace(job.options, checkpoint=part / "fits")
    with job.reporter.task("fit and measure", "steps") as update:
        n_sites = len(traces.sites)
        seen = {"fit": 0, "measure": n_sites}

        def on_site(stage: str, done: int, total: int) -> None:
            update(seen.get(stage, 0) + done, 2 * n_sites)

        card, _ = fit_card(
            job.loaded.model, traces, job.rule, job.target, options=options, texts=texts, on_site=on_site
        )
    write_card(out / "card.json", card)
    plot_card(card, out / "card.png", job.windows.source)
    write_card_page(out / "report.html", card)
    print_card(card, OUT)
