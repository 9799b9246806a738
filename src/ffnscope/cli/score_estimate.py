"""``ffnscope score --dry-run``: the passes over every text, their memory and time; nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from ffnscope.analyze.jackknife import document_groups
from ffnscope.analyze.question import Question
from ffnscope.analyze.repeat_passes import RepeatPasses, repeat_bytes, repeat_passes
from ffnscope.calibrate.collect import PassOptions, Step, plan_steps, statistics_bytes
from ffnscope.calibrate.windows import Windows
from ffnscope.run.estimate import Line, calibrate_line, peak_bytes, print_lines, seconds_per_token
from ffnscope.run.progress import peak_memory

Texts = Mapping[str, tuple[Question, Windows]]


def print_score_estimate(
    asked: Question, windows: Windows, texts: Texts, options: PassOptions, console: Console
) -> None:
    """Print what `ffnscope score` would do: calibrate on ``windows``, then on every text to compare, and score.

    ``texts`` maps labels to questions and windows, as in `compare_calibrations`.
    """
    libraries = peak_memory()["resident"]
    speed = seconds_per_token(asked.model, asked.sites)
    core = asked.rule.size(asked.sites)
    alone = repeat_passes(asked.params, asked.rule, 1)
    sums = statistics_bytes(asked.sites, (*alone.first, *alone.core), core)
    held = 2 * sums
    found = _stages("", alone, [windows], asked, options)
    for label, (question, text) in texts.items():
        parts = [text[mask] for mask in document_groups(text)]
        passes = repeat_passes(question.params, question.rule, len(parts))
        found += _stages(f"{label}: ", passes, parts, question, options)
        held = max(held, repeat_bytes(question.sites, passes, core, len(parts)))
    lines = [
        calibrate_line(stage, what, speed) if isinstance(what, list) else Line(stage, what) for stage, what in found
    ]
    steps = [step for _, what in found if isinstance(what, list) for step in what]
    print_lines(lines, "score", console)
    n_passes = sum(isinstance(what, list) for _, what in found)
    console.print(Text(f"{n_passes} passes over a text in all"))
    disk = f"{sums / 2**20:,.0f} MiB on disk, up to {3 if texts else 2} times that until it is finished"
    console.print(Text(f"sums take up to {held / 2**20:,.0f} MiB in memory; {disk}"))
    peak = peak_bytes(asked.model, asked.sites, steps, []) + held + _reference_bytes(asked)
    on_cpu = all(p.device.type == "cpu" for p in asked.model.parameters())
    console.print(Text(f"peak memory about {(peak + libraries * on_cpu) / 2**30:.1f} GiB"))


def _stages(
    prefix: str, passes: RepeatPasses, parts: Sequence[Windows], asked: Question, options: PassOptions
) -> list[tuple[str, list[Step] | str]]:
    """Stages of one calibration: name -> steps of a pass, or what else is done, in words."""
    found: list[tuple[str, list[Step] | str]] = [
        (f"{prefix}{what}", [step for part in parts for step in plan_steps(part, statistics, options)])
        for what, statistics in passes.named().items()
    ]
    channels = sum(site.d_ff for site in asked.sites)
    what = f"{len(asked.params)} metrics x {channels:,} channels of {len(asked.sites)} FFNs"
    if len(parts) > 1:
        what += f", and again without each of {len(parts)} groups of documents"
    return [*found, (f"{prefix}score", what)]


def _reference_bytes(asked: Question) -> int:
    parameters = asked.reference.parameters() if asked.reference is not None else ()
    return sum(p.numel() * p.element_size() for p in parameters)
