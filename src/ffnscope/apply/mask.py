"""Reversible removal: zero the coupled weights of removed channels and put them back."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from torch import nn

from ffnscope.apply.edits import Edit, applied
from ffnscope.errors import UsageError
from ffnscope.ffn.offload import check_values
from ffnscope.ffn.projection import coupled, producer_widths, shape_of
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
    with applied(model, removals(model, plan)):
        yield model


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


def removals(model: nn.Module, plan: PruningPlan) -> list[Edit]:
    """Zero for every entry of the removed channels."""
    removed = {site: plan.removed(site) for site in plan.kept}
    return [Edit(entry) for site, index in removed.items() if index.numel() for entry in coupled(model, site, index)]
