"""Tokens per second of a placement: measured where there are two devices, simulated where there are not."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ffnscope.errors import NotAvailableError, UsageError
from ffnscope.sparse.placement.frequency import masks_of
from ffnscope.sparse.placement.plan import Placement, Speed
from ffnscope.sparse.split import Part
from ffnscope.sparse.traces import Traces
from ffnscope.types import FFNSite

Selectors = Mapping[FFNSite, Callable[[Tensor], Tensor]]


def simulate(placement: Placement, traces: Traces, selectors: Selectors, part: Part | None = None) -> Speed:
    """Tokens per second if every token of traces were decoded by the machine of the placement: no clock is read.

    For every token and FFN the bytes of its own hot and cold selected channels count, so tokens that need many cold
    channels are as slow as they would be.

    Raises:
        UsageError: no tokens, or a site that has no placement.
        NotAvailableError: experts, of which a trace holds only the tokens that are routed to them.
    """
    seconds: Tensor | None = None
    for site, selector in selectors.items():
        if site not in placement.hot:
            raise UsageError(f"{site.name} is not in this placement; plan it for the same FFNs.")
        if site.expert is not None:
            raise NotAvailableError(f"{site.name} is an expert; only placements of dense FFNs are simulated.")
        hot, size = placement.is_hot(site), placement.channel_bytes[site]
        parts: list[Tensor] = []
        for mask in masks_of(traces.x(site, part), selector):
            chosen = mask.cpu()
            n_hot = (chosen & hot).sum(1).double()
            parts.append(placement.machine.seconds(n_hot * size, (chosen.sum(1) - n_hot) * size))
        one = torch.cat(parts) if parts else torch.zeros(0)
        seconds = one if seconds is None else seconds + one
    if seconds is None or not len(seconds):
        raise UsageError("there are no tokens or no FFNs to simulate; trace more text.")
    mean = float(seconds.mean()) + placement.machine.other_seconds
    if mean <= 0:
        raise UsageError("no channel is selected for any token, so there is no speed to simulate.")
    return Speed(1 / mean, "simulated", len(seconds))


@torch.no_grad()
def measure(model: Any, ids: Tensor, new_tokens: int) -> Speed:
    """Tokens per second of greedy decoding by a model that `split_` has put on two devices.

    Args:
        model: the model, split.
        ids: prompt [1, T].
        new_tokens: to decode.

    Raises:
        NotAvailableError: all parts of the model are on one device, where the clock would tell nothing about two.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) < 2:
        raise NotAvailableError(
            f"the model is on {', '.join(map(str, devices))} alone; a split is measured on two devices. Use simulate."
        )
    ids = ids.to(model.get_input_embeddings().weight.device)
    out = model(input_ids=ids, use_cache=True)
    step = out.logits[:, -1:].argmax(-1)
    out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)  # compiles kernels
    start = time.perf_counter()
    for _ in range(new_tokens):
        step = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
    float(out.logits[0, -1, 0])  # waits for the device
    return Speed(new_tokens / (time.perf_counter() - start), "measured", new_tokens)
