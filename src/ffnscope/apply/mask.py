"""Reversible removal: zero the coupled weights of removed channels and put them back."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor, nn

from ffnscope.errors import UsageError
from ffnscope.ffn.projection import Coupled, check_resident, coupled, producer_widths, shape_of
from ffnscope.types import PruningPlan


@contextlib.contextmanager
def masked(model: nn.Module, plan: PruningPlan) -> Generator[nn.Module]:
    """Within the block, every removed channel contributes nothing: its gate and up rows, biases and down column are 0.

    The logits equal those of the sliced model. On exit the saved entries are copied back, so the model is
    bit-identical, also after an exception or Ctrl-C. Contexts nest.

    Raises:
        UsageError: the plan was made for a model of other shapes.
        ModelError: a weight is offloaded.
    """
    check_plan(model, plan)
    saved: list[tuple[Coupled, Tensor]] = []
    try:
        for site in plan.kept:
            removed = plan.removed(site)
            if removed.numel():
                for entry in coupled(model, site, removed):
                    _zero(entry, saved)
        yield model
    finally:
        _restore(saved)


def check_plan(model: nn.Module, plan: PruningPlan) -> None:
    """Raise unless every site of the plan is in the model, resident, with the shapes that the plan was made for."""
    for site in plan.kept:
        found, d_model = shape_of(model, site)
        if (found, d_model) != (site.d_ff, site.d_model):
            raise UsageError(
                f"the plan was made for {site.name} with {site.d_ff} channels of width {site.d_model}; this model has "
                f"{found} of width {d_model} there. Use the model that was scored."
            )
        expected = (2 if site.fused else 1) * site.d_ff
        for name, width in producer_widths(model, site).items():
            if width != expected:
                raise UsageError(
                    f"the plan was made for {site.name} with {expected} outputs of {name}; this model has {width}. "
                    "Use the model that was scored."
                )
        check_resident(model, site)


@torch.no_grad()
def _zero(entry: Coupled, saved: list[tuple[Coupled, Tensor]]) -> None:
    parameter = entry.parameter
    index = entry.index.to(parameter.device)
    saved.append((entry, parameter.index_select(entry.axis, index)))
    parameter.index_fill_(entry.axis, index, 0)


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
