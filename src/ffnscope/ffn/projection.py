"""Projections: the linear modules of an FFN, and which of their entries belong to which channel.

The one place that knows that `transformers` stores some projections transposed (``Conv1D``) and some as one
matrix for gate and up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ffnscope.errors import LayoutError, ModelError
from ffnscope.types import FFNSite, FFNWeights


@dataclass(frozen=True, slots=True, eq=False)
class Coupled:
    """Entries of one parameter that belong to a set of channels: ``parameter.index_select(axis, index)``."""

    module: nn.Module
    name: str
    axis: int
    index: Tensor

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the module holds it now."""
        return getattr(self.module, self.name)


def is_projection(module: nn.Module) -> bool:
    """Whether a module is a matrix with an optional bias: ``nn.Linear`` or the ``Conv1D`` of `transformers`."""
    weight = getattr(module, "weight", None)
    kind = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return kind and isinstance(weight, Tensor) and weight.dim() == 2


def out_axis(module: nn.Module) -> int:
    """Axis of ``module.weight`` that runs over outputs: 0 for Linear [out, in], 1 for Conv1D [in, out]."""
    return 0 if isinstance(module, nn.Linear) else 1


def in_width(module: nn.Module) -> int:
    """Width of the input of a projection."""
    return module.weight.shape[1 - out_axis(module)]  # type: ignore[union-attr,index,return-value]


def out_width(module: nn.Module) -> int:
    """Width of the output of a projection."""
    return module.weight.shape[out_axis(module)]  # type: ignore[union-attr,index,return-value]


def projection(model: nn.Module, site: FFNSite, name: str) -> nn.Module:
    """Return one projection of a site by its relative name."""
    path = f"{site.path}.{name}" if site.path else name
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise LayoutError(f"{path} is not in this model; the site or plan was made for another model.") from error


def down_projection(model: nn.Module, site: FFNSite) -> nn.Module:
    """Return the projection whose input is the channel activation."""
    return projection(model, site, site.down)


def weights_of(model: nn.Module, site: FFNSite) -> FFNWeights:
    """Canonical views of a site's weights.

    Raises:
        ModelError: a weight is offloaded by accelerate, and this is not inside `materialised`.
        LayoutError: the site is not in this model.
    """
    check_resident(model, site)
    up_weight, up_bias = _canonical(projection(model, site, site.up))
    down_weight, down_bias = _canonical(projection(model, site, site.down))
    if site.gate is None:
        return FFNWeights(None, up_weight, down_weight, None, up_bias, down_bias)
    if site.fused is None:
        gate_weight, gate_bias = _canonical(projection(model, site, site.gate))
        return FFNWeights(gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    first, second = up_weight.chunk(2)
    first_bias, second_bias = (None, None) if up_bias is None else up_bias.chunk(2)
    if site.fused == "gate_up":
        return FFNWeights(first, second, down_weight, first_bias, second_bias, down_bias)
    return FFNWeights(second, first, down_weight, second_bias, first_bias, down_bias)


def coupled(model: nn.Module, site: FFNSite, channels: Tensor) -> Iterator[Coupled]:
    """Yield every entry of the model that belongs to ``channels`` (int64 indices) of a site.

    Rows of gate and up with their biases, and columns of down; the bias of down belongs to no channel.
    """
    producers = dict.fromkeys(n for n in (site.gate, site.up) if n is not None)
    rows = torch.cat([channels, channels + site.d_ff]) if site.fused else channels
    for name in producers:
        module = projection(model, site, name)
        yield Coupled(module, "weight", out_axis(module), rows)
        if getattr(module, "bias", None) is not None:
            yield Coupled(module, "bias", 0, rows)
    down = down_projection(model, site)
    yield Coupled(down, "weight", 1 - out_axis(down), channels)


def check_resident(model: nn.Module, site: FFNSite) -> None:
    """Raise ModelError when a weight of the site is on the meta device, where it has no value."""
    for name in dict.fromkeys(n for n in (site.gate, site.up, site.down) if n is not None):
        if any(p.device.type == "meta" for p in projection(model, site, name).parameters(recurse=False)):
            raise ModelError(
                f"the weights of {site.path}.{name} are offloaded (or were never loaded) and cannot be read or changed "
                "in place. Work inside `with materialised(model, site):` (ffnscope.ffn.offload), or load the model "
                "without offload."
            )


def _canonical(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight: Tensor = module.weight.detach()  # type: ignore[operator,assignment]
    bias: Tensor | None = getattr(module, "bias", None)
    return (weight if out_axis(module) == 0 else weight.T), None if bias is None else bias.detach()
