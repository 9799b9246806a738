"""Reversible removal: zero the coupled weights of removed channels and put them back."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ffnscope.errors import UsageError
from ffnscope.ffn.offload import check_values, edited, is_offloaded
from ffnscope.ffn.projection import Coupled, coupled, producer_widths, shape_of
from ffnscope.types import FFNSite, PruningPlan


@contextlib.contextmanager
def masked(model: nn.Module, plan: PruningPlan) -> Generator[nn.Module]:
    """Within the block, every removed channel contributes nothing: its gate and up rows, biases and down column are 0.

    The logits equal those of the sliced model. On exit the saved entries are copied back, so the model is
    bit-identical, also after an exception or Ctrl-C. An offloaded weight is zeroed whenever it is read. Contexts nest.

    Raises:
        UsageError: the plan was made for a model of other shapes.
        ModelError: a weight is on the meta device without a value.
    """
    check_plan(model, plan)
    saved: list[tuple[Coupled, Tensor]] = []
    with contextlib.ExitStack() as edits:
        try:
            # of one parameter together: experts share it, and each edit copies it
            for (module, name), entries in _removed(model, plan).items():
                if is_offloaded(getattr(module, name)):
                    edits.enter_context(edited(model, module, name, partial(_zeroed, entries)))
                else:
                    for entry in entries:
                        _zero(entry, saved)
            yield model
        finally:
            _restore(saved)


def check_plan(model: nn.Module, plan: PruningPlan) -> None:
    """Raise unless every site of the plan is in the model, with values, in the shapes that the plan was made for."""
    for site in plan.kept:
        found, d_model = shape_of(model, site)
        if (found, d_model) != (site.d_ff, site.d_model):
            raise UsageError(
                f"the plan was made for {site.name} with {site.d_ff} channels of width {site.d_model}; this model has "
                f"{found} of width {d_model} there. Use the model that was scored."
            )
        _check_producers(model, site)
        check_values(model, site)


def _check_producers(model: nn.Module, site: FFNSite) -> None:
    expected = (2 if site.fused else 1) * site.d_ff
    for name, found in producer_widths(model, site).items():
        if found != expected:
            raise UsageError(
                f"the plan was made for {site.name} with {expected} outputs of {name}; this model has {found}. "
                "Use the model that was scored."
            )


def _removed(model: nn.Module, plan: PruningPlan) -> dict[tuple[nn.Module, str], list[Coupled]]:
    """Entries of the removed channels, by the parameter that they are in."""
    found: dict[tuple[nn.Module, str], list[Coupled]] = {}
    for site in plan.kept:
        removed = plan.removed(site)
        if removed.numel():
            for entry in coupled(model, site, removed):
                found.setdefault((entry.module, entry.name), []).append(entry)
    return found


@torch.no_grad()
def _zero(entry: Coupled, saved: list[tuple[Coupled, Tensor]]) -> None:
    parameter = entry.parameter
    index = entry.index.to(parameter.device)
    saved.append((entry, parameter.index_select(entry.axis, index)))
    parameter.index_fill_(entry.axis, index, 0)


def _zeroed(entries: Sequence[Coupled], value: Tensor) -> Tensor:
    new = value.clone()
    for entry in entries:
        entry.part(new).index_fill_(entry.axis, entry.index.to(new.device), 0)
    return new


@torch.no_grad()
def _restore(saved: list[tuple[Coupled, Tensor]]) -> None:
    """Copy everything back, last first; an interrupt in the middle is raised only when all is back."""
    interrupt: KeyboardInterrupt | None = None
    while saved:
        try:
            while saved:
                entry, values = saved[-1]
                entry.parameter.index_copy_(entry.axis, entry.index.to(values.device), values)
                saved.pop()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
