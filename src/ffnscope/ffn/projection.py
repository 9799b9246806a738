"""Projections: the linear modules of an FFN, and which of their entries belong to which channel.

The one place that knows that `transformers` stores some projections transposed (``Conv1D``), some as one matrix for
gate and up, and all experts of a layer in one parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from ffnscope.errors import LayoutError, ModelError
from ffnscope.types import FFNSite, FFNWeights


@dataclass(frozen=True, slots=True, eq=False)
class Coupled:
    """Entries of one parameter that belong to a set of channels: ``parameter.index_select(axis, index)``.

    For an expert, ``rows`` is how many rows of a flat parameter [n_experts * rows, ..] one expert has, or None for a
    parameter [n_experts, ..].
    """

    module: nn.Module
    name: str
    axis: int
    index: Tensor
    expert: int | None = None
    rows: int | None = None

    @property
    def parameter(self) -> Tensor:
        """The parameter as the module holds it now; for an expert the view of its own part."""
        return self.part(getattr(self.module, self.name))

    def part(self, whole: Tensor) -> Tensor:
        """View of a value of the whole parameter; for an expert of its own part."""
        return whole if self.expert is None else _part_of(whole, self.expert, self.rows)


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


def uses_of(site: FFNSite) -> list[FFNSite]:
    """The FFN at each place where it is used: once, or also in the layers that share its parameters."""
    return [replace(site, path=path, twins=()) for path in (site.path, *site.twins)] if site.twins else [site]


def reuse(site: FFNSite) -> str:
    """Clause for messages about an FFN that is used more than once: by what."""
    more = f", {site.runs} times each" if site.runs > 1 else ""
    return f"is used by {1 + len(site.twins)} layers{more}" if site.twins else f"runs {site.runs} times per forward"


def modules_of(site: FFNSite) -> tuple[str, ...]:
    """Full paths of everything that holds weights of the channels, at every use: projections, adapters and the norm."""
    inner = (*site.adapters, *(() if site.norm is None else (site.norm,)))
    paths = [[*use.projections, *(f"{use.path}.{n}" if use.path else n for n in inner)] for use in uses_of(site)]
    return tuple(name for names in paths for name in names)


def channel_readers(model: nn.Module, site: FFNSite) -> list[nn.Module]:
    """Modules whose input is the channel activation h: down, or the norm before it, at every use of the FFN."""
    return [projection(model, use, site.norm or site.down) for use in uses_of(site)]


def shape_of(model: nn.Module, site: FFNSite) -> tuple[int, int]:
    """(d_ff, d_model) of the down projection that this model has at a site.

    Raises:
        LayoutError: the site is not in this model.
    """
    if not site.stacked:
        down = down_projection(model, site)
        return in_width(down), out_width(down)
    part = _expert_part(model, site, site.down)
    axis = _channel_axis(site, site.down)
    return part.shape[axis], part.shape[1 - axis]


def producer_widths(model: nn.Module, site: FFNSite) -> dict[str, int]:
    """Name -> number of outputs of gate, up and adapters as this model has them; gate and up are one when fused."""
    if not site.stacked:
        return {name: out_width(projection(model, site, name)) for name in (*_producers(site), *site.adapters)}
    axis = _channel_axis(site, site.up)
    return {name: _expert_part(model, site, name).shape[axis] for name in _producers(site)}


def weights_of(model: nn.Module, site: FFNSite) -> FFNWeights:
    """Canonical views of a site's weights.

    Where a norm stands before down, ``down`` is a copy with the weight of the norm multiplied into its columns, which
    is what h is multiplied by, up to one number per token. Adapters are not part of gate and up.

    Raises:
        ModelError: a weight is offloaded by accelerate, and this is not inside `materialised`.
        LayoutError: the site is not in this model.
    """
    check_resident(model, site)
    up_weight, up_bias = _canonical(model, site, site.up)
    down_weight, down_bias = _canonical(model, site, site.down)
    if site.norm is not None:
        gain = cast("Tensor", projection(model, site, site.norm).weight).detach()
        down_weight = (down_weight * gain).to(down_weight.dtype)
    if site.gate is None:
        return FFNWeights(None, up_weight, down_weight, None, up_bias, down_bias)
    if site.fused is None:
        gate_weight, gate_bias = _canonical(model, site, site.gate)
        return FFNWeights(gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    first, second = _halves(site, up_weight)
    first_bias, second_bias = (None, None) if up_bias is None else _halves(site, up_bias)
    if site.fused == "up_gate":
        return FFNWeights(second, first, down_weight, second_bias, first_bias, down_bias)
    return FFNWeights(first, second, down_weight, first_bias, second_bias, down_bias)


def canonical_weight(model: nn.Module, site: FFNSite, role: str, stored: Tensor) -> Tensor:
    """Canonical view of one weight of a site: ``role`` gate, up ([d_ff, d_model]) or down ([d_model, d_ff]).

    ``stored`` is the whole parameter that holds it, as the model stores it: with the other half of a fused one, and
    with all experts of a layer.
    """
    name = getattr(site, role)
    weight = _outputs_first(model, site, name, stored)
    if site.fused is None or role == "down":
        return weight
    first, second = _halves(site, weight)
    return second if (role == "gate") == (site.fused == "up_gate") else first


def coupled(model: nn.Module, site: FFNSite, channels: Tensor) -> Iterator[Coupled]:
    """Yield every entry of the model that belongs to ``channels`` (int64 indices) of a site.

    Rows of gate, up and adapters with their biases, entries of the norm, and columns of down; the bias of down belongs
    to no channel. Modules that share a parameter have an entry each.
    """
    rows = producer_rows(site, channels)
    if site.stacked:
        yield from _coupled_expert(model, site, channels, rows)
        return
    for use in uses_of(site):
        yield from _coupled_dense(model, use, channels, rows)


def down_columns(model: nn.Module, site: FFNSite, channels: Tensor) -> Coupled:
    """The columns of down that belong to ``channels``: along axis 1 as [d_model, k], along axis 0 transposed."""
    if site.stacked:
        owner, leaf = owner_of(model, site, site.down), site.down.rpartition(".")[2]
        rows = site.d_ff if site.storage == "flat" else None
        return Coupled(owner, leaf, _channel_axis(site, site.down), channels, site.expert, rows)
    down = down_projection(model, site)
    return Coupled(down, "weight", 1 - out_axis(down), channels)


def whole_expert(model: nn.Module, site: FFNSite, name: str) -> tuple[Coupled, bool]:
    """All entries of one matrix of an expert in shared parameters, along axis 0; and whether it is stored [out, in]."""
    owner, leaf = owner_of(model, site, name), name.rpartition(".")[2]
    rows = site.d_ff if site.storage == "flat" else None
    every = torch.arange(_expert_part(model, site, name).shape[0])
    return Coupled(owner, leaf, 0, every, site.expert, rows), _has_outputs_first(site, name)


def down_bias(model: nn.Module, site: FFNSite) -> Coupled | None:
    """The whole bias [d_model] of down, or None where it has none."""
    owner = owner_of(model, site, site.down)
    name = f"{site.down.rpartition('.')[2]}_bias" if site.stacked else "bias"
    if getattr(owner, name, None) is None:
        return None
    return Coupled(owner, name, 0, torch.arange(site.d_model), site.expert if site.stacked else None)


def _coupled_dense(model: nn.Module, site: FFNSite, channels: Tensor, rows: Tensor) -> Iterator[Coupled]:
    for name in (*_producers(site), *site.adapters):
        module = projection(model, site, name)
        yield Coupled(module, "weight", out_axis(module), rows)
        if getattr(module, "bias", None) is not None:
            yield Coupled(module, "bias", 0, rows)
    if site.norm is not None:
        yield Coupled(projection(model, site, site.norm), "weight", 0, channels)
    yield down_columns(model, site, channels)


def owner_of(model: nn.Module, site: FFNSite, name: str) -> nn.Module:
    """Module that holds the weight of a projection: the projection itself, or the module with an expert's parameter."""
    if not site.stacked:
        return projection(model, site, name)
    path = ".".join(p for p in (site.path, name.rpartition(".")[0]) if p)
    try:
        owner = model.get_submodule(path)
    except AttributeError as error:
        raise _absent(site, name) from error
    if not isinstance(getattr(owner, name.rpartition(".")[2], None), Tensor):
        raise _absent(site, name)
    return owner


def check_resident(model: nn.Module, site: FFNSite) -> None:
    """Raise ModelError when a weight of the site is on the meta device, where it has no value."""
    for name in (*_producers(site), *(() if site.norm is None else (site.norm,)), site.down):
        if any(p.device.type == "meta" for p in owner_of(model, site, name).parameters(recurse=False)):
            raise ModelError(
                f"the weights of {site.path}.{name} are offloaded (or were never loaded) and cannot be read or changed "
                "in place. Work inside `with materialised(model, site):` (ffnscope.ffn.offload), or load the model "
                "without offload."
            )


def _producers(site: FFNSite) -> tuple[str, ...]:
    """Distinct names of gate and up."""
    return tuple(dict.fromkeys(n for n in (site.gate, site.up) if n is not None))


def producer_rows(site: FFNSite, channels: Tensor) -> Tensor:
    """Outputs of the producers that belong to channels, in the order of a narrower producer."""
    if site.fused is None:
        return channels
    if site.fused == "interleaved":
        return torch.stack([2 * channels, 2 * channels + 1], 1).flatten()
    return torch.cat([channels, channels + site.d_ff])


def _halves(site: FFNSite, both: Tensor) -> tuple[Tensor, Tensor]:
    """First and second half of what a fused projection holds."""
    if site.fused == "interleaved":
        return both[0::2], both[1::2]
    first, second = both.chunk(2)
    return first, second


def joined(site: FFNSite, gate: Tensor, up: Tensor) -> Tensor:
    """Rows of gate and up as a projection that holds both stores them: the inverse of how they are told apart."""
    if site.fused == "interleaved":
        return torch.stack([gate, up], 1).flatten(0, 1)
    return torch.cat([up, gate] if site.fused == "up_gate" else [gate, up])


def _coupled_expert(model: nn.Module, site: FFNSite, channels: Tensor, rows: Tensor) -> Iterator[Coupled]:
    per_expert = site.d_ff if site.storage == "flat" else None
    for name in _producers(site):
        owner, leaf = owner_of(model, site, name), name.rpartition(".")[2]
        yield Coupled(owner, leaf, _channel_axis(site, name), rows, site.expert, per_expert)
        if getattr(owner, f"{leaf}_bias", None) is not None:
            yield Coupled(owner, f"{leaf}_bias", 0, rows, site.expert)
    yield down_columns(model, site, channels)


def _channel_axis(site: FFNSite, name: str) -> int:
    """Axis of one expert's matrix that runs over channels."""
    if name == site.down:
        return 1 if site.storage == "linear" else 0
    return 1 if site.storage == "transposed" else 0


def _expert_part(model: nn.Module, site: FFNSite, name: str) -> Tensor:
    """One expert's matrix, as stored."""
    whole = getattr(owner_of(model, site, name), name.rpartition(".")[2])
    rows = site.d_ff if site.storage == "flat" else None
    n_experts = whole.shape[0] if rows is None else whole.shape[0] / rows
    if n_experts % 1 or (site.expert or 0) >= n_experts:
        raise _absent(site, name)
    return _part_of(whole, site.expert or 0, rows)


def _part_of(whole: Tensor, expert: int, rows: int | None) -> Tensor:
    return (whole if rows is None else whole.view(-1, rows, *whole.shape[1:]))[expert]


def _absent(site: FFNSite, name: str) -> LayoutError:
    return LayoutError(f"{site.name} ({name}) is not in this model; the site or plan was made for another model.")


def _canonical(model: nn.Module, site: FFNSite, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight as [out, in] and bias of one projection."""
    owner = owner_of(model, site, name)
    leaf = name.rpartition(".")[2] if site.stacked else "weight"
    weight = _outputs_first(model, site, name, getattr(owner, leaf).detach())
    if not site.stacked:
        bias: Tensor | None = getattr(owner, "bias", None)
        return weight, None if bias is None else bias.detach()
    biases = getattr(owner, f"{leaf}_bias", None)
    return weight, None if biases is None else biases[site.expert].detach()


def _outputs_first(model: nn.Module, site: FFNSite, name: str, stored: Tensor) -> Tensor:
    """View [out, in] of a projection's weight, from the whole parameter as stored."""
    if not site.stacked:
        return stored if out_axis(projection(model, site, name)) == 0 else stored.T
    assert site.expert is not None
    _expert_part(model, site, name)  # the expert is in this model
    part = _part_of(stored, site.expert, site.d_ff if site.storage == "flat" else None)
    return part if _has_outputs_first(site, name) else part.T


def _has_outputs_first(site: FFNSite, name: str) -> bool:
    """Whether one expert's matrix is stored as [out, in]."""
    return _channel_axis(site, name) == (1 if name == site.down else 0)
