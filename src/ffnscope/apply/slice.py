"""Real removal: rows of gate and up, columns of down and biases are cut out of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ffnscope.apply.expert_slice import slice_experts_
from ffnscope.apply.mask import check_plan
from ffnscope.apply.widths import fit_config
from ffnscope.ffn.inner_norm import narrow_norm_, narrow_norm_weight
from ffnscope.ffn.offload import materialised
from ffnscope.ffn.projection import coupled, is_projection, out_axis, projection, uses_of
from ffnscope.types import FFNSite, PruningPlan

# names by which FFN modules of `transformers` remember d_ff
WIDTH_FIELDS = (
    "intermediate_size",
    "ffn_dim",
    "decoder_ffn_dim",
    "n_inner",
    "ffn_hidden_size",
    "dff",
    "dim_ff",
    "feed_forward_size",
)


def slice_(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Remove the channels that a plan does not keep, in place, and return the model.

    Weights and biases shrink, widths that modules remember follow, and the config's fields follow when they can
    express the new widths (see `fit_config`). Offloaded weights stay offloaded. Unequal widths work too; for saving see
    `save_model`. Experts of one layer share their tensors and stay equally wide (see `slice_experts_`).

    Raises:
        UsageError: the plan was made for a model of other shapes; the model is then unchanged.
        ModelError: a weight is on the meta device without a value; the model is then unchanged.
    """
    slice_shapes_(model, plan)
    fit_config(model)
    return model


def slice_shapes_(model: nn.Module, plan: PruningPlan) -> None:
    """What `slice_` does to the weights; the config stays as it is."""
    check_plan(model, plan)
    for site, kept in plan.kept.items():
        if not site.stacked and kept.numel() < site.d_ff:
            with materialised(model, site, write=True):
                _slice_site(model, site, kept)
    slice_experts_(model, plan)


@torch.no_grad()
def _slice_site(model: nn.Module, site: FFNSite, kept: torch.Tensor) -> None:
    uses = uses_of(site)
    norms = [projection(model, use, site.norm) for use in uses if site.norm is not None]
    made: dict[int, tuple[torch.Tensor, nn.Parameter]] = {}  # what several modules share stays shared
    for entry in coupled(model, site, kept):
        old = entry.parameter
        if id(old) not in made:
            new = old.index_select(entry.axis, entry.index.to(old.device)).contiguous()
            new = narrow_norm_weight(new, site.d_ff) if entry.module in norms else new
            made[id(old)] = old, nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(entry.module, entry.name, made[id(old)][1])
    for norm in norms:
        narrow_norm_(norm, site.d_ff, kept.numel())
    for use in uses:
        for name in dict.fromkeys((use.gate, use.up, use.down, *use.adapters)):
            if name is not None:
                _remember_shape(projection(model, use, name))
        parents = {use.path, f"{use.path}.{use.down}".rsplit(".", 1)[0], f"{use.path}.{use.up}".rsplit(".", 1)[0]}
        for path in parents:
            _remember_width(model.get_submodule(path), use.d_ff, kept.numel())


def _remember_shape(module: Any) -> None:
    """Keep the width attributes of a projection true: Linear has in_features/out_features, Conv1D has nx/nf."""
    axis = out_axis(module)
    out, into = module.weight.shape[axis], module.weight.shape[1 - axis]
    names = ("in_features", "out_features") if isinstance(module, nn.Linear) else ("nx", "nf")
    for name, width in zip(names, (into, out), strict=True):
        if hasattr(module, name):
            setattr(module, name, width)


def _remember_width(parent: nn.Module, old: int, new: int) -> None:
    """Follow integers by which an FFN module remembers its own width, such as ``intermediate_size``."""
    if is_projection(parent):
        return
    for name, value in list(vars(parent).items()):
        if name in WIDTH_FIELDS and isinstance(value, int) and value == old:
            setattr(parent, name, new)
