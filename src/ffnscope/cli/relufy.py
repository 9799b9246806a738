"""The command relufy: a model with exact zeros out of one without."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ffnscope.apply.folder import refuse_existing
from ffnscope.calibrate.text import TextSource, check_text, load_windows
from ffnscope.calibrate.windows import Windows
from ffnscope.cli import options as opt
from ffnscope.cli.channels import OUT
from ffnscope.cli.files import Out, Overwrite
from ffnscope.cli.groups import grouped
from ffnscope.cli.relufy_estimate import print_relufy_estimate
from ffnscope.errors import UsageError
from ffnscope.ffn.load import LoadedModel
from ffnscope.report.relufy_plot import plot_relufy
from ffnscope.run.machine import library_bytes
from ffnscope.run.progress import Reporter
from ffnscope.run.texts import held_out_split
from ffnscope.sparse.relu.convert import CALIBRATION, ReluModel, Watch, relufy_
from ffnscope.sparse.relu.penalty import PROSPARSE, ProgressiveL1
from ffnscope.sparse.relu.training import ReluOptions

PLOT = "relufy.png"
_DEFAULT = ReluOptions()


@dataclass(frozen=True, slots=True)
class ReluText:
    """What is trained on, and what is measured on."""

    text: Annotated[str, typer.Option("--text", help="Shipped corpus, .txt, .jsonl, folder, or hub dataset.")] = "sotu"
    split: Annotated[str | None, typer.Option(help="Split of the text to train on.")] = None
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", help="Windows to train on; default: as many as the steps read.")
    ] = None
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens per window.")] = 512
    held_out_text: Annotated[
        str | None, typer.Option(help="Text to measure on; default: the held-out split of --text.")
    ] = None
    held_out_samples: Annotated[int, typer.Option(help="Windows to measure on.")] = 32

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 2), ("max_length", 2), ("held_out_samples", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}; got {value}.")

    def sources(self) -> tuple[TextSource, TextSource]:
        """The text to train on, and the text to measure on; both are there.

        Raises:
            UsageError: no held-out text is known, or it is the one to train on.
            TextError: a text is missing or not readable.
        """
        local = Path(self.text).is_file()
        training = TextSource(self.text, split=self.split or (None if local else "train"))
        check_text(training)
        name = self.held_out_text or self.text
        split = held_out_split(name)
        if split is None and self.held_out_text is None:
            raise UsageError(
                f"{self.text} has no known held-out split to measure on. Give --held-out-text with another text."
            )
        measured = TextSource(name, split=split)
        if (measured.name, measured.split) == (training.name, training.split):
            raise UsageError(f"{measured.describe()} cannot be trained on and measured on; give another text.")
        check_text(measured)
        return training, measured

    def windows(
        self, sources: tuple[TextSource, TextSource], loaded: LoadedModel, read: int
    ) -> tuple[Windows, Windows]:
        """Windows of both texts; ``read`` is how many the steps read."""
        n = self.num_samples or read + min(CALIBRATION, max(1, read // 4))
        numbers = (n, self.held_out_samples)
        first, second = (
            load_windows(source, loaded.tokenizer, n=n, length=self.max_length, seed=0)
            for source, n in zip(sources, numbers, strict=True)
        )
        return first, second


@dataclass(frozen=True, slots=True)
class ReluChoice:
    """How the model is changed and trained."""

    activation: Annotated[str, typer.Option(help="relu, or relu2 for its square.")] = _DEFAULT.activation
    threshold: Annotated[float, typer.Option(help="Train FATReLU with this threshold instead of ReLU.")] = 0.0
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = _DEFAULT.steps
    batch_size: Annotated[int, typer.Option("--batch-size", help="Windows per forward.")] = _DEFAULT.batch_size
    accumulate: Annotated[int, typer.Option(help="Forwards per step.")] = _DEFAULT.accumulate
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, at its highest.")] = _DEFAULT.learning_rate
    l1: Annotated[float, typer.Option(help="Last weight of the L1 penalty; stages rise to it as ProSparse's.")] = (
        PROSPARSE[-1].weight
    )
    measure_every: Annotated[
        int | None, typer.Option(help="Steps between measurements and checkpoints; default: a tenth of all.")
    ] = None
    shift: Annotated[bool, typer.Option(help="Calibrate a threshold for every FFN at the end.")] = True
    rise: Annotated[float, typer.Option(help="Rise of the perplexity that thresholds may cost, as a share.")] = (
        _DEFAULT.rise or 0.0
    )
    seed: Annotated[int, typer.Option(help="Seed of the order of the windows.")] = 0

    def options(self, context: typer.Context) -> ReluOptions:
        """Check the numbers; raises UsageError."""
        if not self.shift:
            opt.refuse_useless(context, "--no-shift", ("rise",))
        return ReluOptions(
            self.activation,
            self.threshold,
            self.steps,
            self.batch_size,
            self.accumulate,
            self.learning_rate,
            ProgressiveL1.up_to(self.l1),
            self.measure_every,
            self.rise if self.shift else None,
            self.seed,
        )


@grouped
def relufy_command(
    *,
    context: typer.Context,
    model: opt.Model,
    out: Out,
    text: ReluText,
    choice: ReluChoice,
    loading: opt.Loading,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and how long it would take.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Replace SiLU or GELU by ReLU and train with a growing L1 penalty (ProSparse): OUT, a plain checkpoint.

    Exact zeros and perplexity are measured along the way: OUT/progress.jsonl and relufy.png. At the end every FFN gets
    a threshold (FATReLU), in OUT/thresholds.json, since no config of transformers can hold it. An interrupted call goes
    on from its last checkpoint.
    """
    refuse_existing(out, overwrite)
    options = choice.options(context)
    sources = text.sources()
    reporter = Reporter()
    libraries = library_bytes() if dry_run else 0  # before the model is loaded
    loaded = loading.open(reporter, model)
    read = options.steps * options.batch_size * options.accumulate
    windows, held_out = text.windows(sources, loaded, read)
    if dry_run:
        print_relufy_estimate(loaded, windows, held_out, options, libraries, OUT)
        return
    with reporter.task("train", "steps") as on_step:
        trials = _Trials(reporter)
        title = f"{loaded.source.model_id}, {held_out.source}"
        draw = partial(_draw, title) if importlib.util.find_spec("matplotlib") is not None else None
        watch = Watch(on_step, trials.update, draw)
        found = relufy_(loaded, windows, held_out, out, options=options, overwrite=overwrite, watch=watch)
    if draw is None:
        reporter.say("note: no plot of the training; that needs matplotlib (pip install 'ffnscope[plots]')")
    _print(found, OUT)
    reporter.say(f"saved in {out}")


def _draw(title: str, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add the plot to an output that has not got its name yet, so that none is ever without it."""
    plot_relufy(rows, folder / PLOT, title)


@dataclass(slots=True)
class _Trials:
    """Tells how the calibration of thresholds goes on, in lines."""

    reporter: Reporter
    said: list[str] = field(default_factory=list[str])

    def update(self, done: int, total: int) -> None:
        """Say it at the beginning and at the end."""
        if done in (1, total):
            self.reporter.say(f"thresholds: {done} of {total} passes over the calibration windows")


def _print(found: ReluModel, console: Console) -> None:
    table = Table("stage", "step", "perplexity", "exact zeros")
    for row in found.rows:
        cells = (str(row["step"]), f"{row['perplexity']:.4g}", f"{row['sparsity']:.2%}")
        table.add_row(str(row["stage"]), *cells)
    console.print(table)
