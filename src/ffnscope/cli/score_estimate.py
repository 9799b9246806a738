"""``ffnscope score --dry-run``: the passes over every text, their memory and time; nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ffnscope.analyze.jackknife import document_groups
from ffnscope.analyze.levels import calibration_passes
from ffnscope.analyze.memory import calibration_bytes
from ffnscope.analyze.question import Question
from ffnscope.analyze.repeat_passes import repeat_bytes, repeat_passes
from ffnscope.calibrate.collect import PassOptions, plan_steps
from ffnscope.calibrate.steps import Step
from ffnscope.calibrate.windows import Windows
from ffnscope.ffn.load import LoadedModel
from ffnscope.run.bounds import Workload, load_of_steps
from ffnscope.run.estimate import calibrate_line, with_reading
from ffnscope.run.lines import Line, print_lines
from ffnscope.run.seconds import seconds_per_token
from ffnscope.run.switches import COMMAND, bounds_of, print_advice

Texts = Mapping[str, tuple[Question, Windows]]


def print_score_estimate(
    asked: Question,
    windows: Windows,
    texts: Texts,
    options: PassOptions,
    loaded: LoadedModel,
    libraries: int,
    console: Console,
) -> None:
    """Print what `ffnscope score` would do: calibrate on ``windows``, then on every text to compare, and score.

    ``texts`` maps labels to questions and windows, as in `compare_calibrations`; ``loaded`` is the model that is asked
    about; ``libraries``: see `bounds_of`.
    """
    speed = seconds_per_token(asked.model, asked.sites)
    given: Any = {"sites": asked.sites, "rule": asked.rule, "options": options}
    alone = calibration_bytes(asked.model, windows, asked.params, **given)
    held = alone.beside_batches
    passes = zip(("calibrate", "calibrate core"), calibration_passes(**given, metrics=asked.params), strict=False)
    found = _stages("", {name: statistics for name, statistics in passes if statistics}, [windows], asked, options)
    for label, (question, text) in texts.items():
        parts = [text[mask] for mask in document_groups(text)]
        passes = repeat_passes(question.params, question.rule, len(parts))
        found += _stages(f"{label}: ", passes.named(), parts, question, options)
        size = repeat_bytes(question.sites, passes, question.rule.size(question.sites), len(parts))
        held = max(held, size)
    lines = [
        calibrate_line(stage, what, speed) if isinstance(what, list) else Line(stage, what) for stage, what in found
    ]
    steps = max((what for _, what in found if isinstance(what, list)), key=len, default=[])
    work = Workload(
        load_of_steps(steps, backward=False),
        load_of_steps(steps, backward=True),
        sums=held,
        more=reference_weights(asked),
    )
    bounds = bounds_of(loaded, asked.sites, work, libraries)
    print_lines(with_reading(lines, loaded, asked.sites), "score", console)
    n_passes = sum(isinstance(what, list) for _, what in found)
    console.print(Text(f"{n_passes} passes over a text in all"))
    disk = f"up to {3 if texts else 2} times that until it is finished"
    console.print(Text(f"{alone.told}, {disk}; sums take up to {held / 2**20:,.0f} MiB of memory in all"))
    print_advice(bounds, COMMAND, console)


def _stages(
    prefix: str, passes: Mapping[str, list[str]], parts: Sequence[Windows], asked: Question, options: PassOptions
) -> list[tuple[str, list[Step] | str]]:
    """Stages of one calibration: name -> steps of a pass, or what else is done, in words."""
    found: list[tuple[str, list[Step] | str]] = [
        (f"{prefix}{what}", [step for part in parts for step in plan_steps(part, statistics, options)])
        for what, statistics in passes.items()
    ]
    channels = sum(site.d_ff for site in asked.sites)
    what = f"{len(asked.params)} metrics x {channels:,} channels of {len(asked.sites)} FFNs"
    if len(parts) > 1:
        what += f", and again without each of {len(parts)} groups of documents"
    return [*found, (f"{prefix}score", what)]


def reference_weights(asked: Question) -> int:
    """Bytes of the model before fine-tuning; 0 where there is none."""
    parameters = asked.reference.parameters() if asked.reference is not None else ()
    return sum(p.numel() * p.element_size() for p in parameters)
