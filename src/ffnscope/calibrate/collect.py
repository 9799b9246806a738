"""The calibration pass: one sweep over the windows that collects what every requested metric needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.calibrate.checkpoint import Checkpoint
from ffnscope.calibrate.groups import document_groups
from ffnscope.calibrate.passes import OnBatch, run_steps
from ffnscope.calibrate.steps import Step
from ffnscope.calibrate.sums import Surroundings, following
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.ffn.offload import named_values
from ffnscope.ffn.sites import find_sites
from ffnscope.ffn.stream import find_stream
from ffnscope.ffn.survey import survey
from ffnscope.io import hash_json, hash_tensors
from ffnscope.registry import METRICS, STATISTICS
from ffnscope.types import ChannelStats, FFNSite


@dataclass(frozen=True, slots=True)
class PassOptions:
    """How a calibration pass runs.

    Attributes:
        batch_size: windows per forward; changes speed and memory, not results.
        gradient_windows: how many of the windows, spread evenly over the text, also run backward; None = all.
        gradient_length: cuts only the windows that run backward; None = whole windows.
        checkpoint: file that keeps the sums of an unfinished pass; None = an interrupted pass starts again.
        checkpoint_every: windows between two savings of the sums.
        keep_checkpoint: leave the file of a finished pass, from which the same call takes its result; the caller
            removes it. For passes that are followed by longer ones.
        one_pass_bytes: memory that may be spent to spare the pass for the supernode core; see `takes_one_pass`.
        document_groups: for statistics by document, documents are put together in at most so many groups.
        model_hash: `weights_hash` of the model where it is known already; else a checkpoint takes the time to find it.
    """

    batch_size: int = 4
    gradient_windows: int | None = None
    gradient_length: int | None = None
    checkpoint: Path | None = None
    checkpoint_every: int = 32
    keep_checkpoint: bool = False
    one_pass_bytes: int = 2**30
    document_groups: int = 64
    model_hash: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_windows", "gradient_length", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1; got {value}.")
        if self.one_pass_bytes < 0:
            raise UsageError(f"one_pass_bytes must not be negative, 0 = never one pass; got {self.one_pass_bytes}.")


MetricChoice = Sequence[str] | Mapping[str, Mapping[str, Any]]
"""Metric names, or metric name -> its parameters (some metrics need other statistics for other parameters)."""


def required_statistics(metrics: MetricChoice, *, core: bool | None = None) -> list[str]:
    """Return the union of the statistics that metrics need, each once.

    ``core`` chooses those that can only be taken once the supernode core is known (True), the others (False), or all.
    """
    chosen = metrics if isinstance(metrics, Mapping) else {name: {} for name in metrics}
    names = dict.fromkeys(need for name, params in chosen.items() for need in METRICS.get(name).needed(params))
    return [n for n in names if core is None or STATISTICS.get(n).needs_core is core]


def calibrate(
    model: nn.Module,
    windows: Windows,
    metrics: MetricChoice,
    *,
    sites: Sequence[FFNSite] | None = None,
    core: Mapping[FFNSite, Tensor] | None = None,
    options: PassOptions | None = None,
    on_batch: OnBatch | None = None,
) -> dict[FFNSite, ChannelStats]:
    """Run the model over ``windows`` once and return the statistics that ``metrics`` need.

    Without a gradient metric there is no backward, and everything runs under ``inference_mode``. Otherwise
    ``gradient_windows`` of them also run backward, with gradients for channel activations only: no weight gradient
    exists at any time. Sums are float64 and do not depend on the batch size. A streamed model (`ModelSource.stream`)
    runs block by block, each block being read once per direction (see `ffnscope.calibrate.sweep`); a
    checkpoint of it has a folder beside the file, in which sums and hidden states are saved after each block.

    Args:
        model: a causal LM; left as it was.
        windows: calibration text.
        metrics: metric names, or names with parameters; only their union of statistics is collected.
        sites: FFNs to observe; None finds all.
        core: supernode core per site (see `top_core`). Without it the pass takes what needs no core; with it, only what
            does. Join the two results with `join_statistics`.
        options: sizes and checkpoint file.
        on_batch: called with (tokens done, tokens in all) after each batch.

    Raises:
        NonFiniteError: an activation or gradient overflowed; the site is named.
        DeviceError: out of memory; the key to lower is named.
        NotAvailableError: a metric needs gradients, and the code of the model lets none through.
    """
    names = required_statistics(metrics, core=core is not None)
    return collect(model, windows, names, sites=sites, core=core, options=options, on_batch=on_batch)


def collect(
    model: nn.Module,
    windows: Windows,
    statistics: Sequence[str],
    *,
    sites: Sequence[FFNSite] | None = None,
    core: Mapping[FFNSite, Tensor] | None = None,
    options: PassOptions | None = None,
    on_batch: OnBatch | None = None,
) -> dict[FFNSite, ChannelStats]:
    """Run the model over ``windows`` once and return these statistics: `calibrate`, by statistics instead of metrics.

    Those that read the core and those that do not may be mixed, once the core is known.
    """
    options = options or PassOptions()
    sites = list(sites) if sites is not None else find_sites(model)
    names = list(statistics)
    if any(STATISTICS.get(name).beyond_ffns for name in names):
        sites += find_stream(model, sites).observed
    windows, around = _surroundings(model, windows, names, sites, options)
    accumulator = Accumulator(sites, names, core, around)
    steps = plan_steps(windows, names, options)
    saver = _checkpoint(model, windows, names, accumulator, options) if steps else None
    run_steps(model, sites, steps, accumulator, saver, on_batch)
    if saver:
        saver.finish(len(steps), accumulator, keep=options.keep_checkpoint)
    return accumulator.result(copy=False)


def _surroundings(
    model: nn.Module, windows: Windows, names: Sequence[str], sites: Sequence[FFNSite], options: PassOptions
) -> tuple[Windows, Surroundings]:
    """What statistics read beyond a site; in the windows ``document`` becomes the group of documents."""
    known = [STATISTICS.get(name) for name in names]
    following_sites: dict[FFNSite, FFNSite] = {}
    if any(one.reads_next for one in known):
        chosen = set(sites)
        following_sites = {a: b for a, b in following(survey(model).sites).items() if {a, b} <= chosen}
    if not any("document" in one.reads for one in known):
        return windows, Surroundings(following_sites)
    masks = document_groups(windows, options.document_groups)
    group = torch.stack(masks).long().argmax(0) if masks else windows.document
    return replace(windows, document=group), Surroundings(following_sites, len(masks))


def join_statistics(
    first: Mapping[FFNSite, ChannelStats], second: Mapping[FFNSite, ChannelStats]
) -> dict[FFNSite, ChannelStats]:
    """Join the statistics of two passes over the same sites: different statistics, not different text.

    Raises:
        UsageError: the sites differ, a statistic is in both, or gradients were taken of different amounts of text.
    """
    joined: dict[FFNSite, ChannelStats] = {}
    if _ffns(first) != _ffns(second):
        raise UsageError("cannot join the statistics of two passes over different sites; calibrate both for the same.")
    for site in {**first, **second}:
        none = ChannelStats(site, {}, {}, {})
        a, b = first.get(site, none), second.get(site, none)
        _check_joint(site, a, b)
        joined[site] = ChannelStats(
            site, {**a.values, **b.values}, {**a.counts, **b.counts}, {**a.reductions, **b.reductions}
        )
    return joined


def _ffns(sites: Iterable[FFNSite]) -> set[FFNSite]:
    return {site for site in sites if site.role == "ffn"}


def _check_joint(site: FFNSite, a: ChannelStats, b: ChannelStats) -> None:
    both = sorted(a.values.keys() & b.values.keys())
    if both:
        raise UsageError(f"cannot join two passes that both collected {both[0]!r} of {site.name}.")
    counts = {p.counts[n] for p in (a, b) for n in p.counts if STATISTICS.get(n).needs_gradient}
    if len(counts) > 1:
        found = " and ".join(str(n) for n in sorted(counts))
        raise UsageError(
            f"cannot join two passes that took gradients of {found} predicted tokens of {site.name}: give both passes "
            "the same windows and options."
        )


def plan_steps(windows: Windows, statistics: Sequence[str], options: PassOptions) -> list[Step]:
    """List the batches of a pass. Whole gradient windows serve both kinds of statistics in one forward."""
    needs_g = [STATISTICS.get(n).needs_gradient for n in statistics]
    if not needs_g:
        return []
    if len(windows) == 0:
        raise UsageError("there is no calibration window; give a text of at least one window.")
    split = min(options.gradient_windows or len(windows), len(windows)) if any(needs_g) else 0
    chosen = spread(len(windows), split)
    head, tail = windows[chosen], windows[~chosen]
    forward = not all(needs_g)
    cut = options.gradient_length is not None and options.gradient_length < windows.length
    if split and cut:
        short = head.cut(options.gradient_length or 0)
        return [
            *_steps(short, options.batch_size, forward=False, backward=True),
            *(_steps(windows, options.batch_size, forward=True, backward=False) if forward else ()),
        ]
    return [
        *_steps(head, options.batch_size, forward=forward, backward=True),
        *(_steps(tail, options.batch_size, forward=True, backward=False) if forward else ()),
    ]


def spread(total: int, count: int) -> Tensor:
    """Mask [total] that chooses ``count`` windows evenly; windows are in text order, so the first would be one part."""
    mask = torch.zeros(total, dtype=torch.bool)
    mask[[i * total // count for i in range(count)]] = True
    return mask


def weights_hash(model: nn.Module) -> str:
    """Hash of all weights: names, shapes, dtypes and bytes. Offloaded weights are read, so they give the same hash.

    Raises:
        ModelError: a weight is on the meta device without a value.
    """
    return hash_tensors(named_values(model))


def _steps(windows: Windows, size: int, *, forward: bool, backward: bool) -> Iterator[Step]:
    for batch in windows.batches(size):
        yield Step(batch, forward, backward)


def _checkpoint(
    model: nn.Module, windows: Windows, names: list[str], accumulator: Accumulator, options: PassOptions
) -> Checkpoint | None:
    if options.checkpoint is None:
        return None
    facts = {
        "model": [options.model_hash or weights_hash(model), repr(getattr(model, "config", type(model).__name__))],
        "windows": windows.hash,
        "statistics": names,
        "sites": [asdict(s) for s in accumulator.sites],
        "core": {s.name: index.tolist() for s, index in accumulator.core.items()},
        "sizes": [options.batch_size, options.gradient_windows, options.gradient_length],
    }
    if accumulator.sums.around.n_documents:
        facts["groups"] = windows.document.tolist()
    return Checkpoint(options.checkpoint, options.checkpoint_every, hash_json(facts))
