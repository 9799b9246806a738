"""What removing FFN channels does to the loss, measured: one channel at a time, or a set of them together.

Removing channel c changes the FFN's output by -h_c * down[:, c] and nothing before it. So the residual stream that
enters the FFN's block is computed once per batch of windows, and only the blocks from there on run again, for many
channels in one forward.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ffnscope.analyze.suffix import Prefix, prefix_of
from ffnscope.apply.copies import NOTHING, ablated_copies
from ffnscope.apply.mask import check_plan, masked
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.evaluate.forward import batch_logits, check_finite, evaluating, memory_errors
from ffnscope.evaluate.perplexity import check_targets, token_losses
from ffnscope.evaluate.progress import DENSE, Progress, open_progress
from ffnscope.types import Budget, FFNSite, PruningPlan

OnTokens = Callable[[int, int], None]
CHECKED_TOKENS = 64
# largest difference between a suffix and a whole forward, as a share of the largest logit; norms and routers of float64
# models may compute in float32
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-4}
COARSE = 0.03  # bfloat16 and float16


@dataclass(frozen=True, slots=True, eq=False)
class Ablation:
    """Measured loss changes of single channels of several FFNs, per window of text.

    Attributes:
        channels: site -> the k channels that were removed, one at a time, [k] int64.
        change: site -> change of the summed token NLL of each window, in nats, [k, n] float64; positive = loss rises.
        moved: site -> sum of the absolute changes of the token NLLs of each window, in nats, [k, n] float64.
        dense: summed token NLL of each window of the unpruned model, in nats, [n] float64.
        n_targets: tokens behind each of these sums, [n] int64.
        document: document that each window starts in, [n] int64.
        whole: names of the sites for which the whole model had to run, because its blocks cannot be skipped.
    """

    channels: Mapping[FFNSite, Tensor]
    change: Mapping[FFNSite, Tensor]
    moved: Mapping[FFNSite, Tensor]
    dense: Tensor
    n_targets: Tensor
    document: Tensor
    whole: tuple[str, ...]

    def loss_change(self, windows: Tensor | None = None) -> dict[FFNSite, Tensor]:
        """Change of the mean token NLL, in nats/token, site -> [k]; over all windows, or those of a mask [n] bool."""
        return self._mean(self.change, windows)

    def token_change(self, windows: Tensor | None = None) -> dict[FFNSite, Tensor]:
        """Mean absolute change of a token's NLL, in nats, site -> [k]; over all windows, or those of a mask [n] bool.

        Rises and falls do not cancel here, so that a channel counts which helps some tokens and harms others.
        """
        return self._mean(self.moved, windows)

    def _mean(self, sums: Mapping[FFNSite, Tensor], windows: Tensor | None) -> dict[FFNSite, Tensor]:
        chosen = torch.ones_like(self.n_targets, dtype=torch.bool) if windows is None else windows
        total = int(self.n_targets[chosen].sum())
        if not total:
            raise UsageError("no token is predicted in the chosen windows, so there is no mean loss change.")
        return {site: value[:, chosen].sum(1) / total for site, value in sums.items()}


def ablate_channels(
    model: nn.Module,
    channels: Mapping[FFNSite, Tensor],
    windows: Windows,
    *,
    batch_size: int = 4,
    state: Path | None = None,
    on_tokens: OnTokens | None = None,
) -> Ablation:
    """Remove channels one at a time and measure the change of every window's loss.

    The channels of a site share the forward up to the site's block. From there on a forward runs ``batch_size``
    windows: copies of a few, each without another channel. Before that, skipping the first blocks is tried on a piece
    of text. Where it does not give the logits of the whole model, the whole model runs for each channel, and the site
    is named.

    Args:
        model: the dense model; bit-identical afterwards.
        channels: site -> distinct channels [k] int64 of it.
        windows: held-out text.
        batch_size: windows per forward, those without different channels included; it sets memory, not results.
        state: file with what was measured, written after each site and after an interrupt, continued from if it belongs
            to the same text and model.
        on_tokens: called with (tokens run, tokens in all) after each forward.

    Raises:
        UsageError: no channel, one outside its site, no target, or a site of another model.
        NonFiniteError: a loss is NaN or infinite.
        DeviceError: the accelerator is out of memory.
        ArtifactError: ``state`` is damaged or of another kind.
    """
    check_targets(windows)
    check_channels(model, channels)
    if batch_size < 1:
        raise UsageError(f"batch size must be at least 1; got {batch_size}.")
    progress = open_progress(state, model, windows)
    total = sum(len(index) for index in channels.values()) * windows.n_tokens
    run = _Run(model, windows, batch_size, progress, total, on_tokens)
    whole: list[str] = []
    with evaluating(model):
        for site, index in channels.items():
            try:
                if not run.measure(site, index.tolist()):
                    whole.append(site.name)
            finally:
                progress.save()
    change, moved = (
        {s: torch.stack([progress.total(_key(s, c), name) for c in index.tolist()]) for s, index in channels.items()}
        for name in ("change", "moved")
    )
    dense, counts = progress.total(DENSE, "nll"), windows.targets.sum(1)
    return Ablation(dict(channels), change, moved, dense, counts, windows.document, tuple(whole))


def joint_change(model: nn.Module, plan: PruningPlan, windows: Windows, *, batch_size: int = 4) -> Tensor:
    """Change of each window's summed token NLL when all channels that a plan removes are removed together.

    The first blocks are run once per batch where nothing is removed from them (see `ablate_channels`).

    Returns:
        [n] float64, in nats; positive = the loss rises.

    Raises:
        UsageError: the plan is of another model, or no token is a target.
    """
    check_targets(windows)
    check_plan(model, plan)
    sites = [site for site in plan.kept if plan.removed(site).numel()]
    prefix = prefix_of(model, sites) if sites else Prefix([])
    parts: list[Tensor] = []
    with evaluating(model):
        if not is_skipped_exactly(model, prefix, sites, windows):
            prefix = Prefix([])
        for batch in windows.batches(batch_size):
            with memory_errors(len(batch), batch.length):
                with prefix.recording():
                    dense = token_losses(batch_logits(model, batch), batch)
                with masked(model, plan), prefix.skipping(1):
                    parts.append((token_losses(batch_logits(model, batch), batch) - dense).sum(1))
    return torch.cat(parts)


def check_channels(model: nn.Module, channels: Mapping[FFNSite, Tensor]) -> None:
    """Raise UsageError unless there are channels, all distinct and inside their sites, which are in the model."""
    if not channels or not all(len(index) for index in channels.values()):
        raise UsageError("there is no channel to remove: give at least one site, and one channel of every site.")
    for site, index in channels.items():
        if index.dtype != torch.int64 or index.dim() != 1 or index.unique().numel() != index.numel():
            raise UsageError(
                f"channels of {site.name}: expected distinct int64 indices [k]; got {index.dtype} {tuple(index.shape)}."
            )
        if int(index.min()) < 0 or int(index.max()) >= site.d_ff:
            raise UsageError(
                f"channels of {site.name} must be in [0, {site.d_ff}); got {int(index.min())} to {int(index.max())}."
            )
        check_plan(model, _without(site, int(index[0])))


@dataclass(slots=True)
class _Run:
    """One measurement on its way."""

    model: nn.Module
    windows: Windows
    batch_size: int
    progress: Progress
    total: int
    on_tokens: OnTokens | None
    done: int = 0

    def measure(self, site: FFNSite, channels: list[int]) -> bool:
        """Fill what is missing of a site; returns whether its first blocks could be skipped."""
        prefix = prefix_of(self.model, [site])
        cut = is_skipped_exactly(self.model, prefix, [site], self.windows)
        copies = min(len(channels), self.batch_size) if cut else 1
        size = max(1, self.batch_size // copies)
        for number, batch in enumerate(self.windows.batches(size)):
            part = slice(number * size, number * size + len(batch))
            missing = [c for c in channels if not self.progress.has(_key(site, c), part)]
            self._tell(len(channels) - len(missing), batch)
            if missing or not self.progress.has(DENSE, part):
                with memory_errors(len(batch) * copies, batch.length):
                    self._batch(site, batch, part, _chunks(missing, copies), prefix if cut else None)
        return cut

    def _batch(
        self, site: FFNSite, batch: Windows, part: slice, chunks: Sequence[list[int]], prefix: Prefix | None
    ) -> None:
        with contextlib.ExitStack() as stack:
            if prefix is not None:
                stack.enter_context(prefix.recording())
                # experts run as they will with copies, or the other kernel's rounding would pass for a change
                stack.enter_context(ablated_copies(self.model, site, [NOTHING], batch.input_ids.numel()))
            dense = token_losses(batch_logits(self.model, batch), batch)
        self._put(DENSE, part, batch, {"nll": dense.sum(1)})
        for chunk in chunks:
            losses = _losses_without(self.model, site, chunk, batch, prefix)
            for channel, change in zip(chunk, (losses - dense).unbind(), strict=True):
                self._put(_key(site, channel), part, batch, {"change": change.sum(1), "moved": change.abs().sum(1)})
            self._tell(len(chunk), batch)

    def _put(self, key: str, part: slice, batch: Windows, sums: dict[str, Tensor]) -> None:
        for value in sums.values():
            check_finite(value, self.model, batch, part.start)
        self.progress.put(key, part, sums)

    def _tell(self, n_channels: int, batch: Windows) -> None:
        self.done += n_channels * batch.n_tokens
        if self.on_tokens is not None and n_channels:
            self.on_tokens(self.done, self.total)


def _losses_without(
    model: nn.Module, site: FFNSite, channels: list[int], batch: Windows, prefix: Prefix | None
) -> Tensor:
    """Token NLL [k, b, T] of a batch without each channel; by the whole model where there is no prefix."""
    if prefix is None:
        found: list[Tensor] = []
        for channel in channels:
            with masked(model, _without(site, channel)):
                found.append(token_losses(batch_logits(model, batch), batch))
        return torch.stack(found)
    copies = _copies(batch, len(channels))
    with prefix.skipping(len(channels)), ablated_copies(model, site, channels, batch.input_ids.numel()):
        return token_losses(batch_logits(model, copies), copies).view(len(channels), *batch.input_ids.shape)


def is_skipped_exactly(model: nn.Module, prefix: Prefix, sites: Sequence[FFNSite], windows: Windows) -> bool:
    """Whether skipping the blocks before ``sites`` gives the whole model's logits: with all channels, and without one.

    Tried on two copies of the first window, cut to a few tokens.
    """
    if not sites:
        return False
    site, removed = sites[0], 0
    batch = windows[:1].cut(CHECKED_TOKENS)
    both = _copies(batch, 2)
    with prefix.recording():
        dense = batch_logits(model, batch)
    if prefix.blocks and not prefix.is_known:
        return False
    with masked(model, _without(site, removed)):
        expected = torch.cat([dense, batch_logits(model, batch)])
    with prefix.skipping(2), ablated_copies(model, site, [NOTHING, removed], batch.input_ids.numel()):
        found = batch_logits(model, both)
    if found.shape != expected.shape:
        return False
    limit = ROUNDING.get(expected.dtype, COARSE) * float(expected.abs().max())
    return float((found.double() - expected.double()).abs().max()) <= limit


def _without(site: FFNSite, channel: int) -> PruningPlan:
    kept = torch.arange(site.d_ff)
    return PruningPlan({site: kept[kept != channel]}, "ablation", "single", Budget(1 / site.d_ff))


def _copies(batch: Windows, n: int) -> Windows:
    ids, valid, targets = (t.repeat(n, 1) for t in (batch.input_ids, batch.valid, batch.targets))
    return Windows(ids, valid, targets, batch.document.repeat(n), batch.source)


def _chunks(channels: Sequence[int], size: int) -> list[list[int]]:
    """Nearly equal chunks of at most ``size``."""
    n = math.ceil(len(channels) / size)
    return list(_split(channels, n)) if n else []


def _split(channels: Sequence[int], n: int) -> Iterator[list[int]]:
    for i in range(n):
        yield list(channels[i * len(channels) // n : (i + 1) * len(channels) // n])


def _key(site: FFNSite, channel: int) -> str:
    return f"{site.name}#{channel}"
