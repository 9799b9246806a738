"""Biases of FFNs that have none, where a field of the config can switch them on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ffnscope.apply.widths import Change, changed_config, set_fields, shapes_of, stock_model, width_fields
from ffnscope.errors import NotAvailableError
from ffnscope.ffn.offload import is_offloaded
from ffnscope.ffn.projection import down_bias, down_projection, out_width
from ffnscope.ffn.survey import survey
from ffnscope.types import FFNSite


def without_bias(model: nn.Module, sites: Sequence[FFNSite]) -> list[FFNSite]:
    """Sites whose down projection has no bias, but could be given one.

    Raises:
        NotAvailableError: experts in shared parameters, which have no place for it, or an offloaded weight.
    """
    found = [site for site in sites if down_bias(model, site) is None]
    for site in found:
        if site.stacked:
            raise NotAvailableError(
                f"{site.name} lies in parameters that all experts of its layer share, without a bias; a bias can only "
                "be given to FFNs that are modules. Use a least-squares refit (`reconstruct`)."
            )
        if is_offloaded(down_projection(model, site).weight):  # type: ignore[arg-type]
            raise NotAvailableError(
                f"the weights of {site.name} are offloaded and have no bias that could be changed. Load the model "
                "without offload, or use a least-squares refit (`reconstruct`)."
            )
    return found


def check_bias(model: nn.Module, sites: Sequence[FFNSite]) -> None:
    """Raise NotAvailableError unless a checkpoint of this model can hold a bias of each of these FFNs."""
    new = without_bias(model, sites)
    if new:
        bias_switch(model, new)


def bias_switch(model: nn.Module, sites: Sequence[FFNSite]) -> Change:
    """The change of the config that gives the down projections of ``sites`` a bias, and no module but FFNs.

    It is found by trial: a switch of the config that is off and has "bias" in its name is turned on in a copy, and the
    class is built from it on the meta device.

    Raises:
        NotAvailableError: no field of this config does that.
    """
    config, here = _config(model), shapes_of(model).keys()
    wanted = {f"{site.projections[-1]}.bias" for site in sites}
    possible = {f"{name}.bias" for site in survey(model).sites if not site.stacked for name in site.projections}
    for path, value in width_fields(config):
        if value is not False or "bias" not in path:
            continue
        changed = changed_config(config, {path: True})
        built = None if changed is None else stock_model(model, changed)
        if built is not None:
            new = shapes_of(built).keys() - here
            if here <= shapes_of(built).keys() and wanted <= new <= possible:
                return {path: True}
    raise NotAvailableError(
        f"{type(model).__name__} (model_type {config.model_type!r}) has FFNs without a bias, and no field of its "
        "config gives them one, so no checkpoint could hold it. Evaluate it in memory (a run without checkpoints, or "
        "reconstructed() in Python), or use a least-squares refit (`reconstruct`), which needs no bias."
    )


@torch.no_grad()
def switch_on_(model: nn.Module, change: Change) -> None:
    """Write a change of `bias_switch` into the model's config and give the modules that it asks for biases of zero."""
    set_fields(_config(model), change)
    here, built = shapes_of(model).keys(), stock_model(model, _config(model))
    assert built is not None
    for name in shapes_of(built).keys() - here:
        add_bias_(model.get_submodule(name.rpartition(".")[0]))


def add_bias_(module: nn.Module) -> None:
    """Give a projection a bias of zero."""
    weight: Any = module.weight
    zero = torch.zeros(out_width(module), dtype=weight.dtype, device=weight.device)
    module.bias = nn.Parameter(zero, requires_grad=weight.requires_grad)


def remove_bias_(module: nn.Module) -> None:
    """Take a bias away again, as if there had never been one."""
    module.register_parameter("bias", None)


def _config(model: nn.Module) -> Any:
    return model.config
