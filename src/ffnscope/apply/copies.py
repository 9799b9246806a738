"""Many single-channel ablations in one forward: the batch holds copies of its windows, each without another channel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.ffn.expert_calls import Call, expert_calls, group_experts
from ffnscope.ffn.expert_lists import routed_tokens
from ffnscope.ffn.projection import channel_readers
from ffnscope.types import FFNSite

NOTHING = -1
"""In place of a channel: a copy from which nothing is removed."""


@contextlib.contextmanager
def ablated_copies(model: nn.Module, site: FFNSite, channels: Sequence[int], n_tokens: int) -> Generator[None]:
    """Within the block, copy k of a batch runs without channel ``channels[k]`` of a site.

    The batch must be ``len(channels)`` copies of the same windows, one copy after the other (``ids.repeat(k, 1)``). A
    channel is removed by zeroing the activation that the down projection (or a norm before it) reads, which equals
    `masked` for a plan that removes this channel. Nothing is changed in the model; the hooks are gone on exit, also
    after an exception.

    Args:
        model: the model of the site.
        site: where channels are removed. Experts in shared parameters run by their plain loop within the block.
        channels: a channel per copy, or `NOTHING`.
        n_tokens: tokens of one copy, padding included.
    """
    if site.stacked:
        with expert_calls(model, list(group_experts([site])), _expert(site, channels, n_tokens)):
            yield
        return
    tokens: list[Tensor] = []
    hook = _dense(channels) if site.expert is None else _listed(channels, n_tokens, tokens)
    handles = [reader.register_forward_pre_hook(hook) for reader in channel_readers(model, site)]
    try:
        with routed_tokens(model, [site], lambda _, given: tokens.append(given)):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _dense(channels: Sequence[int]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        h: Tensor = args[0]
        without = h.clone(memory_format=torch.contiguous_format)
        copies = without.view(len(channels), -1, h.shape[-1])  # also where tokens are flattened before the FFN
        for copy, channel in zip(copies, channels, strict=True):
            if channel != NOTHING:
                copy[:, channel] = 0
        return (without, *args[1:])

    return hook


def _listed(channels: Sequence[int], n_tokens: int, tokens: list[Tensor]) -> Any:
    """For an expert that is a module of its own; ``tokens`` gets those of its call before its down projection runs."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        h: Tensor = args[0]
        if not h.numel():
            return None
        removed = torch.tensor(channels, device=h.device)[tokens.pop().to(h.device) // n_tokens]
        rows = (removed != NOTHING).nonzero().flatten()
        without = h.clone(memory_format=torch.contiguous_format)
        without[rows, removed[rows]] = 0
        return (without, *args[1:])

    return hook


def _expert(site: FFNSite, channels: Sequence[int], n_tokens: int) -> Callable[..., Tensor]:
    def observe(call: Call, run: Callable[[Tensor], Tensor]) -> Tensor:
        part = next((p for p in call.parts if p.expert == site.expert), None)
        if not call.is_down or part is None:
            return run(call.x)
        removed = torch.tensor(channels, device=call.x.device)[part.tokens // n_tokens]
        rows = torch.arange(len(removed), device=call.x.device) if part.slot is None else part.tokens
        some = removed != NOTHING
        x = call.x.clone()
        (x if part.slot is None else x[part.slot])[rows[some], removed[some]] = 0
        return run(x)

    return observe
