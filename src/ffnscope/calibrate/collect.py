"""The calibration pass: one sweep over the windows that collects what every requested metric needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.calibrate.forward import forward_logits
from ffnscope.calibrate.taps import channel_taps, frozen
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import DeviceError, UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.io import hash_json, hash_tensors, read_stats, write_stats
from ffnscope.registry import METRICS, STATISTICS
from ffnscope.types import ChannelStats, FFNSite

OnBatch = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class PassOptions:
    """How a calibration pass runs.

    Attributes:
        batch_size: windows per forward; changes speed and memory, not results.
        gradient_windows: how many of the windows (the first) also run backward; None = all.
        gradient_length: cuts only the windows that run backward; None = whole windows.
        checkpoint: file that keeps the sums of an unfinished pass; None = an interrupted pass starts again.
        checkpoint_every: windows between two savings of the sums.
    """

    batch_size: int = 4
    gradient_windows: int | None = None
    gradient_length: int | None = None
    checkpoint: Path | None = None
    checkpoint_every: int = 32

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_windows", "gradient_length", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1; got {value}.")


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One batch of the pass, and whether it observes activations, gradients or both."""

    batch: Windows
    forward: bool
    backward: bool


def required_statistics(metrics: Iterable[str]) -> list[str]:
    """Return the union of the statistics that metrics need, each once."""
    return list(dict.fromkeys(need for name in metrics for need in METRICS.get(name).needs))


def calibrate(
    model: nn.Module,
    windows: Windows,
    metrics: Sequence[str],
    *,
    sites: Sequence[FFNSite] | None = None,
    options: PassOptions | None = None,
    on_batch: OnBatch | None = None,
) -> dict[FFNSite, ChannelStats]:
    """Run the model over ``windows`` once and return the statistics that ``metrics`` need.

    Without a gradient metric there is no backward, and everything runs under ``inference_mode``. Otherwise the first
    ``gradient_windows`` also run backward, with gradients for channel activations only: no weight gradient exists at
    any time. Sums are float64 and do not depend on the batch size.

    Args:
        model: a causal LM; left as it was.
        windows: calibration text.
        metrics: metric names; only their union of statistics is collected.
        sites: FFNs to observe; None finds all.
        options: sizes and checkpoint file.
        on_batch: called with (tokens done, tokens in all) after each batch.

    Raises:
        NonFiniteError: an activation or gradient overflowed; the site is named.
        DeviceError: out of memory; the key to lower is named.
    """
    options = options or PassOptions()
    sites = list(sites) if sites is not None else find_sites(model)
    names = required_statistics(metrics)
    accumulator = Accumulator(sites, names)
    steps = plan_steps(windows, names, options)
    total = sum(s.batch.n_tokens for s in steps)
    done = 0
    saver = _Saver(model, windows, names, sites, options) if options.checkpoint and steps else None
    start = saver.resume(accumulator) if saver else 0
    with frozen(model):
        for i, step in enumerate(steps):
            if i >= start:
                _run(model, sites, step, accumulator)
                accumulator.check_finite()
                if saver:
                    saver.after(i, step, accumulator, last=i + 1 == len(steps))
            done += step.batch.n_tokens
            if on_batch and i + 1 >= start:
                on_batch(done, total)
    return accumulator.result()


def plan_steps(windows: Windows, statistics: Sequence[str], options: PassOptions) -> list[Step]:
    """List the batches of a pass. Whole gradient windows serve both kinds of statistics in one forward."""
    needs_g = [STATISTICS.get(n).needs_gradient for n in statistics]
    if not needs_g:
        return []
    if len(windows) == 0:
        raise UsageError("there is no calibration window; give a text of at least one window.")
    split = min(options.gradient_windows or len(windows), len(windows)) if any(needs_g) else 0
    head, tail = windows[slice(0, split)], windows[slice(split, None)]
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


def weights_hash(model: nn.Module) -> str:
    """Hash of all weights: names, shapes, dtypes and bytes. Offloaded (meta) weights count by shape."""
    resident = ((k, v if v.device.type != "meta" else torch.zeros(0)) for k, v in model.state_dict().items())
    return hash_tensors(resident)


def sum_nll(logits: Tensor, batch: Windows) -> Tensor:
    """Sum of the negative log-likelihood (nats) of all target tokens of a batch; logits [batch, T, vocab]."""
    targets = batch.targets[:, 1:].to(logits.device)
    picked = logits[:, :-1][targets]
    labels = batch.input_ids[:, 1:].to(logits.device)[targets]
    dtype = torch.promote_types(picked.dtype, torch.float32)
    return nn.functional.cross_entropy(picked.to(dtype), labels, reduction="sum")


def _steps(windows: Windows, size: int, *, forward: bool, backward: bool) -> Iterator[Step]:
    for batch in windows.batches(size):
        yield Step(batch, forward, backward)


def _run(model: nn.Module, sites: Sequence[FFNSite], step: Step, accumulator: Accumulator) -> None:
    batch = step.batch
    accumulator.begin(batch.valid, batch.n_targets)
    observe = accumulator.observe if step.forward and accumulator.forward else None
    observe_gradient = accumulator.observe_gradient if step.backward else None
    try:
        if step.backward:
            with torch.enable_grad(), channel_taps(model, sites, observe, observe_gradient):
                sum_nll(forward_logits(model, batch), batch).backward()
        else:
            with torch.inference_mode(), channel_taps(model, sites, observe):
                forward_logits(model, batch)
    except torch.OutOfMemoryError as error:
        key = "metrics.scar.max_length or calibration.batch_size" if step.backward else "calibration.batch_size"
        raise DeviceError(
            f"out of memory in the calibration pass ({len(batch)} windows of {batch.length} tokens). Lower {key}."
        ) from error


class _Saver:
    """Keeps the sums of an unfinished pass in one file, with a key of everything that they depend on."""

    def __init__(
        self, model: nn.Module, windows: Windows, names: list[str], sites: Sequence[FFNSite], options: PassOptions
    ):
        assert options.checkpoint is not None
        self.path = options.checkpoint
        self.every = options.checkpoint_every
        self.key = hash_json(
            {
                "model": weights_hash(model),
                "windows": windows.hash,
                "statistics": names,
                "sites": [asdict(s) for s in sites],
                "sizes": [options.batch_size, options.gradient_windows, options.gradient_length],
            }
        )
        self.pending = 0

    def resume(self, accumulator: Accumulator) -> int:
        """Return the first step that is still to run; a file of another pass is ignored."""
        if not self.path.exists():
            return 0
        stats, facts = read_stats(self.path)
        if facts.get("key") != self.key:
            return 0
        accumulator.restore(stats.values())
        return int(facts["next_step"])

    def after(self, index: int, step: Step, accumulator: Accumulator, *, last: bool) -> None:
        self.pending += len(step.batch)
        if last:
            self.path.unlink(missing_ok=True)
        elif self.pending >= self.every:
            write_stats(self.path, accumulator.result().values(), {"key": self.key, "next_step": index + 1})
            self.pending = 0
