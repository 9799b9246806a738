"""What a run would do: passes, tokens, memory and time, told before anything long starts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ffnscope.calibrate.collect import PassOptions, plan_steps, required_statistics
from ffnscope.ffn.load import load_model, quiet_transformers
from ffnscope.ffn.sites import find_sites
from ffnscope.registry import STATISTICS
from ffnscope.run import stages
from ffnscope.run.runner import model_source
from ffnscope.run.schema import RunConfig
from ffnscope.types import FFNSite

EFFICIENCY = 0.6  # share of a bare matrix product's speed that a whole forward reaches


@dataclass(frozen=True, slots=True)
class Line:
    """One stage: what it reads, and how long it would take (seconds; None = seconds at most)."""

    stage: str
    what: str
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """Lines per stage, peak memory in bytes, and the statistics that one pass would collect."""

    lines: list[Line]
    peak_bytes: int
    statistics: list[str]


def estimate(config: RunConfig) -> Estimate:
    """Load model and text, run nothing, and estimate from shapes and a short probe of the machine's speed.

    Texts are cut into their windows, so a text that is missing or too short fails here.
    """
    loaded = load_model(model_source(config))
    sites = find_sites(loaded.model, config.model.tracked_layers)
    calibration = stages.calibration_windows(config, loaded.tokenizer)
    held_out = stages.evaluation_windows(config, loaded.tokenizer) if config.evaluation.enabled else []
    names = required_statistics(config.metric_names)
    scar = config.metrics.scar
    options = PassOptions(config.calibration.batch_size, scar.num_samples, scar.max_length)
    steps = plan_steps(calibration, names, options)
    forward = sum(s.batch.n_tokens for s in steps)
    backward = sum(s.batch.n_tokens for s in steps if s.backward)
    seconds = _seconds_per_token(loaded.model, sites)
    n_plans = len(config.pruning.algorithms) * len(config.pruning.ratios) if config.pruning.enabled else 0
    lines = [Line("calibrate", _passes(forward, backward), (forward + backward) * seconds)]
    lines.append(Line("score", f"{len(config.metric_names)} metrics x {sum(s.d_ff for s in sites):,} channels", None))
    lines.append(Line("plan", f"{n_plans} plans", None))
    for windows in held_out:
        tokens = windows.n_tokens * (1 + n_plans)
        what = f"{1 + n_plans} models x {windows.n_tokens:,} tokens of {windows.source}"
        lines.append(Line("evaluate", what, tokens * seconds))
    samples = config.evaluation.samples
    if config.evaluation.enabled and samples.enabled:
        what = f"{(1 + n_plans) * len(samples.prompts)} texts of up to {samples.max_new_tokens} tokens"
        lines.append(Line("samples", what, None))
    batch = max((s.batch for s in steps if s.backward), key=lambda b: b.input_ids.numel(), default=None)
    tokens_at_once = batch.input_ids.numel() if batch is not None else 0
    return Estimate(lines, _peak_bytes(loaded.model, sites, names, tokens_at_once), names)


def print_estimate(config: RunConfig, console: Console) -> None:
    """Print the estimate as a table."""
    with quiet_transformers():
        found = estimate(config)
    table = Table("stage", "what", "about", title=f"{config.experiment.name}: nothing was computed (--dry-run)")
    for line in found.lines:
        table.add_row(line.stage, line.what, "seconds" if line.seconds is None else _duration(line.seconds))
    console.print(table)
    console.print(f"1 calibration pass collects: {', '.join(found.statistics) or 'nothing'}")
    console.print(f"peak memory about {found.peak_bytes / 2**30:.1f} GiB; output in {config.output_dir}")


def _passes(forward: int, backward: int) -> str:
    if not forward:
        return "no pass: every metric reads weights only"
    return f"1 pass: {forward:,} tokens forward" + (f", {backward:,} of them backward" if backward else "")


def _seconds_per_token(model: Any, sites: list[FFNSite]) -> float:
    """Time of one token's forward: 2 FLOP per weight at the measured speed of a matrix product of the FFN's shape."""
    weight = next(p for p in model.parameters() if p.dim() == 2)
    a = torch.randn(1024, sites[0].d_model, device=weight.device, dtype=weight.dtype)
    b = torch.randn(sites[0].d_model, sites[0].d_ff, device=weight.device, dtype=weight.dtype)
    times: list[float] = []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ b)[0, 0])
        times.append(time.perf_counter() - start)
    speed = 2 * a.shape[0] * b.numel() / min(times)  # the least disturbed run
    return 2 * sum(p.numel() for p in model.parameters()) / (speed * EFFICIENCY)


def _peak_bytes(model: Any, sites: list[FFNSite], names: list[str], tokens: int) -> int:
    """Weights, saved activations of one backward batch, logits, and the sums."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    size = next(iter(model.parameters())).element_size()
    per_token = sum(4 * s.d_ff + 12 * s.d_model for s in sites) * size
    vocab = model.get_input_embeddings().weight.shape[0]
    sums = 0
    for name in names:
        fixed = [n for n in STATISTICS.get(name).shape if isinstance(n, int)]
        rows = fixed[0] if fixed else 1
        sums += sum(8 * rows * s.d_ff for s in sites)
    return int(weights + tokens * (per_token + 3 * 4 * vocab) + 2 * sums)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
