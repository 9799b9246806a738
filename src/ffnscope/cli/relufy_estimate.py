"""``ffnscope relufy --dry-run``: training, measurements and thresholds, their memory and time; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.text import Text

from ffnscope.calibrate.windows import Windows
from ffnscope.ffn.load import LoadedModel
from ffnscope.run.bounds import Shapes, shapes_of
from ffnscope.run.lines import Line, print_lines
from ffnscope.run.seconds import seconds_per_token
from ffnscope.run.switches import GIB, Machine, Need, machine_of, peak_line
from ffnscope.sparse.relu.activation import replace_activation_
from ffnscope.sparse.relu.convert import CALIBRATION
from ffnscope.sparse.relu.training import ReluOptions
from ffnscope.types import FFNSite

_TRAINED = 16  # bytes per weight: itself, its gradient and the two moments of AdamW, in float32
_SAVED, _LOGITS = 4, 12  # bytes per value that is kept for the backward, and per logit with its gradient


def print_relufy_estimate(
    loaded: LoadedModel, text: Windows, held_out: Windows, options: ReluOptions, libraries: int, console: Console
) -> None:
    """Print what would run; the activation is replaced in memory to see whether it can be.

    ``libraries``: main memory in bytes before the model was loaded.
    """
    model: Any = loaded.model
    sites = replace_activation_(model, options.activation)
    print_lines(_lines(model, sites, text, held_out, options), "relufy", console)
    for line in training_advice(shapes_of(model, sites), text.length, options, machine_of(model, libraries)):
        console.print(Text(line))


def _lines(model: Any, sites: Sequence[FFNSite], text: Windows, held_out: Windows, options: ReluOptions) -> list[Line]:
    speed = seconds_per_token(model, sites)
    tokens = options.steps * options.accumulate * options.batch_size * text.length
    times = -(-options.steps // options.every)
    lines = [
        Line("replace", f"{len(sites)} FFNs get {options.activation}; plain transformers loads the result"),
        Line("train", f"{options.steps} steps, {tokens:,} tokens of {text.source}", 3 * speed * tokens),
        Line("measure", f"{times + 3} times {held_out.n_tokens:,} tokens", (times + 3) * speed * held_out.n_tokens),
    ]
    if options.rise is not None:
        n_tokens = min(CALIBRATION, max(1, len(text) // 4)) * text.length
        lines.append(Line("shift", f"12 times {n_tokens:,} tokens", 12 * speed * n_tokens))
    n_parameters = sum(p.numel() for p in model.parameters())
    disk = f"up to {2 * 12 * n_parameters / GIB:.1f} GiB beside the output until it is finished"
    return [*lines, Line("checkpoints", f"one every {options.every} steps, {disk}")]


def training_advice(shapes: Shapes, length: int, options: ReluOptions, machine: Machine) -> list[str]:
    """Lines: the peak of training in windows of so many tokens, whether it fits, and if not what smaller batches take.

    Steps of as many tokens in smaller batches are the same training. Weights must all be there, in float32.
    """
    asked = _need(shapes, length, options, machine)
    first = peak_line(asked, machine)
    if asked.fits(machine):
        return [first]
    if options.batch_size == 1:
        return [f"{first}, and no option but a shorter --max-length or a smaller model takes less"]
    small = _need(shapes, length, replace(options, batch_size=1), machine)
    fits = "fits" if small.fits(machine) else "does NOT fit either"
    switch = f"--batch-size 1 --accumulate {options.batch_size * options.accumulate}"
    return [first, f"  {switch} would take {small.told()}: {fits}"]


def _need(shapes: Shapes, length: int, options: ReluOptions, machine: Machine) -> Need:
    batch = options.batch_size * length * (shapes.saved * _SAVED + shapes.vocabulary * _LOGITS)
    device = _TRAINED * shapes.weights + batch
    if machine.device is None:
        return Need("", "train", device + machine.held)
    return Need("", "train", device, machine.held)
