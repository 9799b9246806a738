"""The head of a model in a streamed pass: what is observed there, and the gradient that goes back to the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.calibrate.head import Head
from ffnscope.calibrate.observe import no_gradient
from ffnscope.calibrate.steps import Step, begin_step
from ffnscope.calibrate.taps import channel_taps
from ffnscope.calibrate.windows import Windows
from ffnscope.types import FFNSite


def observe_head(
    head: Head, sites: Sequence[FFNSite], step: Step, hidden: Tensor, accumulator: Accumulator
) -> Tensor | None:
    """Run the head over one batch, slice by slice, and return d(summed token NLL) / d hidden where it runs backward.

    Args:
        head: its weights should be held.
        sites: what is observed behind the blocks; with none, only tokens with a target behind them are run.
        step: the batch, and what is observed.
        hidden: behind the last block, [b, T, d_model].
        accumulator: takes what the sites give.

    Raises:
        NotAvailableError: the code of the model lets no gradient through.
    """
    labels = next_labels(step.batch)
    wanted = torch.ones_like(labels, dtype=torch.bool) if sites else labels >= 0
    index = wanted.nonzero().flatten()
    rows, labels = hidden.flatten(0, 1), labels[index]
    gradient = torch.zeros_like(rows) if step.backward else None
    parts = _Parts()
    for part in head.slices(len(index)):
        taken = index[part].to(rows.device)
        with torch.inference_mode(False), torch.set_grad_enabled(step.backward):
            one = rows[taken].detach().requires_grad_(step.backward)
            on_gradient = parts.gradient if step.backward else None
            with channel_taps(head.blocks.model, sites, parts.activation, on_gradient):
                logits = head.logits(one)
                if gradient is not None and bool((labels[part] >= 0).any()):
                    _backward(head.blocks.model, logits, labels[part])
                    assert one.grad is not None, "the loss depends on it"
                    gradient[taken] = one.grad
                elif gradient is not None:
                    parts.no_gradient(sites)
    if sites:
        begin_step(accumulator, step, forward=step.forward, backward=step.backward)
        parts.hand_to(accumulator, sites, backward=step.backward)
    return None if gradient is None else gradient.view_as(hidden)


def next_labels(batch: Windows) -> Tensor:
    """For every token, the one that it predicts where that counts in the loss, else -1; [b * T] int64."""
    labels = torch.full_like(batch.input_ids, -1)
    labels[:, :-1] = torch.where(batch.targets[:, 1:], batch.input_ids[:, 1:], -1)
    return labels.flatten()


def _backward(model: nn.Module, logits: Tensor, labels: Tensor) -> None:
    if not logits.requires_grad:
        raise no_gradient(model)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    labels = labels.to(logits.device)
    nn.functional.cross_entropy(logits.to(dtype), labels, ignore_index=-1, reduction="sum").backward()


@dataclass(slots=True, eq=False)
class _Parts:
    """What sites behind the blocks gave in the slices of one batch."""

    h: dict[FFNSite, list[Tensor]] = field(default_factory=dict[FFNSite, list[Tensor]])
    g: dict[FFNSite, list[Tensor]] = field(default_factory=dict[FFNSite, list[Tensor]])

    def activation(self, site: FFNSite, h: Tensor) -> None:
        self.h.setdefault(site, []).append(h.flatten(0, -2))

    def gradient(self, site: FFNSite, h: Tensor, g: Tensor) -> None:
        self.g.setdefault(site, []).append(g.flatten(0, -2))

    def no_gradient(self, sites: Sequence[FFNSite]) -> None:
        """A slice without a target has gradients of zero."""
        for site in sites:
            self.g.setdefault(site, []).append(torch.zeros_like(self.h[site][-1]))

    def hand_to(self, accumulator: Accumulator, sites: Sequence[FFNSite], *, backward: bool) -> None:
        held = {site: torch.cat(self.h.pop(site)) for site in sites}
        for site, h in held.items():
            accumulator.observe(site, h)
        for site in reversed(sites) if backward else ():
            accumulator.observe_gradient(site, held[site], torch.cat(self.g.pop(site)))
