"""Reversible replacement: some channels hold a constant, as their mean, whatever the token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.errors import UsageError
from ffnscope.ffn.expert_calls import Call, Experts, expert_calls, group_experts
from ffnscope.ffn.projection import channel_readers
from ffnscope.types import FFNSite

Constants = Mapping[FFNSite, tuple[Tensor, Tensor]]


@contextlib.contextmanager
def replaced(model: nn.Module, constants: Constants) -> Generator[nn.Module]:
    """Within the block, h of some channels is a constant where the down projection, or the norm before it, reads it.

    With zeros this is what `masked` does. No weight changes, and the hooks are gone on exit, also after an exception.
    Experts in shared parameters run by their plain loop within the block.

    Args:
        model: the model of the sites.
        constants: site -> channels [k] int64 and their values [k].

    Raises:
        UsageError: as many values as channels were expected, or a channel is outside its site.
    """
    for site, (index, values) in constants.items():
        _check(site, index, values)
    groups = group_experts(constants)
    handles: list[Any] = []
    try:
        for site, given in constants.items():
            if not site.stacked:
                readers = channel_readers(model, site)
                handles += [reader.register_forward_pre_hook(_hook(*given)) for reader in readers]
        with expert_calls(model, list(groups), _observe(groups, constants)):
            yield model
    finally:
        for handle in handles:
            handle.remove()


def _check(site: FFNSite, index: Tensor, values: Tensor) -> None:
    if index.dtype != torch.int64 or index.dim() != 1 or values.shape != index.shape:
        raise UsageError(
            f"constants of {site.name}: expected int64 channels [k] and as many values; got {index.dtype} "
            f"{tuple(index.shape)} and {tuple(values.shape)}."
        )
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= site.d_ff):
        raise UsageError(
            f"channels of {site.name} must be in [0, {site.d_ff}); got {int(index.min())} to {int(index.max())}."
        )


def _hook(index: Tensor, values: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_put(args[0], index, values), *args[1:])

    return hook


def _put(h: Tensor, index: Tensor, values: Tensor) -> Tensor:
    found = h.clone()
    found[..., index.to(h.device)] = values.to(h.device, h.dtype)
    return found


def _observe(groups: Mapping[Experts, Mapping[int, FFNSite]], constants: Constants) -> Callable[..., Tensor]:
    def observe(call: Call, run: Callable[[Tensor], Tensor]) -> Tensor:
        if not call.is_down:
            return run(call.x)
        x = call.x
        for part in call.parts:
            site = groups[call.experts].get(part.expert)
            if site is None:
                continue
            index, values = constants[site]
            if part.slot is None:
                x = _put(x, index, values)
            else:
                x = x.clone()
                x[part.slot] = _put(x[part.slot], index, values)
        return run(x)

    return observe
