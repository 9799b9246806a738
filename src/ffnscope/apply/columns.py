"""Down columns of FFNs, replaced for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ffnscope.ffn.offload import edited, is_offloaded
from ffnscope.ffn.projection import Coupled, coupled
from ffnscope.types import FFNSite

_Change = tuple[Coupled, Tensor]


@contextlib.contextmanager
def columns_replaced(model: nn.Module, down: Mapping[FFNSite, Tensor]) -> Generator[None]:
    """Within the block, the down projections of these FFNs are others, [d_model, d_ff] each.

    On exit the old values are copied back, so the model is bit-identical, also after an exception or Ctrl-C. An
    offloaded weight is replaced whenever it is read.
    """
    changes: dict[tuple[nn.Module, str], list[_Change]] = {}
    for site, value in down.items():
        entry = _down_entry(model, site)
        changes.setdefault((entry.module, entry.name), []).append((entry, value))
    saved: list[tuple[Coupled, Tensor]] = []
    with contextlib.ExitStack() as edits:
        try:
            for (module, name), given in changes.items():
                if is_offloaded(getattr(module, name)):
                    edits.enter_context(edited(model, module, name, partial(_edited, given)))
                else:
                    for entry, value in given:
                        saved.append((entry, entry.parameter.detach().clone()))
                        _write(entry, entry.parameter, value)
            yield
        finally:
            _restore(saved)


def _down_entry(model: nn.Module, site: FFNSite) -> Coupled:
    """The parameter of the down projection; the last of the entries that belong to channels."""
    return list(coupled(model, site, torch.arange(site.d_ff)))[-1]


@torch.no_grad()
def _write(entry: Coupled, place: Tensor, value: Tensor) -> None:
    place.copy_(value if entry.axis == 1 else value.T)


def _edited(given: Sequence[_Change], value: Tensor) -> Tensor:
    new = value.clone()
    for entry, columns in given:
        _write(entry, entry.part(new), columns)
    return new


@torch.no_grad()
def _restore(saved: list[tuple[Coupled, Tensor]]) -> None:
    """Copy everything back; an interrupt in the middle is raised only when all is back."""
    interrupt: KeyboardInterrupt | None = None
    while saved:
        try:
            while saved:
                entry, value = saved[-1]
                entry.parameter.copy_(value)
                saved.pop()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
