"""Real removal within fused experts: all experts of a layer lie in the same tensors, so they become equally wide."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ffnscope.ffn.expert_calls import Experts, group_experts
from ffnscope.ffn.offload import materialised
from ffnscope.ffn.projection import Coupled, coupled, owner_of
from ffnscope.types import FFNSite, PruningPlan

# names by which modules with fused experts remember d_ff
_WIDTHS = ("intermediate_dim", "intermediate_size", "expert_dim", "ffn_hidden_size")


def slice_experts_(model: nn.Module, plan: PruningPlan) -> None:
    """Cut the channels that a plan does not keep out of the tensors of the experts, in place.

    Experts keep different channels, but as many as the expert of their layer that keeps most, rounded up to what the
    grouped kernel of `transformers` can run (rows of 16 bytes: 4 channels in float32, 8 in bfloat16). Where an expert
    keeps fewer, removed channels stay in the tensor with all their weights zero, which computes the same. A
    `UserWarning` tells how many. Experts that the plan leaves out keep all.
    """
    surplus: dict[str, tuple[int, int]] = {}
    for experts, sites in group_experts(plan.kept).items():
        one = next(iter(sites.values()))
        kept = _kept_by_all(model, experts, {e: plan.kept[s] for e, s in sites.items()}, one)
        width = _common_width(model.get_submodule(experts.path), experts, kept)
        zeroed = sum(width - index.numel() for index in kept.values())
        if zeroed:
            surplus[experts.path] = (width, zeroed)
        if zeroed or width < one.d_ff:
            with materialised(model, one, write=True):  # brings all experts, which lie in the same tensors
                _slice(model, experts, {s: _widened(model, s, index, width) for s, index in kept.items()})
    if surplus:
        path, (width, zeroed) = next(iter(surplus.items()))
        warnings.warn(
            "experts of one layer lie in one tensor, so they have one width, which the grouped kernel wants in rows of "
            f"16 bytes; in {len(surplus)} layer(s) the plan asks for others, and {sum(n for _, n in surplus.values())} "
            f"removed channels are zeroed instead of cut ({path}: width {width}, {zeroed} zeroed). The allocator "
            "'local' with multiple_of 8 cuts all.",
            stacklevel=3,
        )


def width_step(module: nn.Module, experts: Experts) -> int:
    """Step of the widths of fused experts: channels of a row of 16 bytes where a grouped kernel may run them."""
    return max(16 // module.get_parameter(experts.down).itemsize, 1) if hasattr(module, "is_transposed") else 1


def _common_width(module: nn.Module, experts: Experts, kept: Mapping[FFNSite, Tensor]) -> int:
    """Width of the tensors: that of the widest expert, rounded up where a grouped kernel may run it."""
    widest, d_ff = max(index.numel() for index in kept.values()), next(iter(kept)).d_ff
    step = width_step(module, experts)
    return min(-(-widest // step) * step, d_ff)


def _kept_by_all(
    model: nn.Module, experts: Experts, planned: Mapping[int, Tensor], example: FFNSite
) -> dict[FFNSite, Tensor]:
    """Kept channels of every expert in the tensors, those that the plan leaves out included."""
    rows = model.get_submodule(experts.path).get_parameter(experts.down).shape[0]
    count = rows if experts.d_ff is None else rows // experts.d_ff
    everything = torch.arange(example.d_ff)
    return {replace(example, expert=e): planned.get(e, everything) for e in range(count)}


@torch.no_grad()
def _widened(model: nn.Module, site: FFNSite, kept: Tensor, width: int) -> Tensor:
    """Add as many removed channels as are missing to ``width``, their weights zeroed."""
    if kept.numel() == width:
        return kept
    mask = torch.ones(site.d_ff, dtype=torch.bool)
    mask[kept] = False
    extra = mask.nonzero().flatten()[: width - kept.numel()]
    for entry in coupled(model, site, extra):
        entry.parameter.index_fill_(entry.axis, entry.index.to(entry.parameter.device), 0)
    return torch.cat([kept, extra]).sort().values


@torch.no_grad()
def _slice(model: nn.Module, experts: Experts, kept: Mapping[FFNSite, Tensor]) -> None:
    example, width = next((site, index.numel()) for site, index in kept.items())
    if width == example.d_ff:
        return
    entries = [list(coupled(model, site, index)) for site, index in kept.items()]
    for column in zip(*entries, strict=True):
        old = getattr(column[0].module, column[0].name)
        setattr(column[0].module, column[0].name, nn.Parameter(_cut(old, column), requires_grad=old.requires_grad))
    owners = {owner_of(model, example, name) for name in (*experts.producers, experts.down)}
    parent = model.get_submodule(experts.path.rpartition(".")[0])
    for module in {*owners, model.get_submodule(experts.path), parent}:
        _remember_width(module, example.d_ff, width)


def _cut(whole: Tensor, entries: Sequence[Coupled]) -> Tensor:
    parts = [e.parameter.index_select(e.axis, e.index.to(whole.device)) for e in entries]
    if entries[0].rows is not None:
        return torch.cat(parts)
    last = entries[-1]
    # LongCat keeps rows in its producers for experts that do nothing; they are never read
    idle = [p.index_select(last.axis, last.index.to(whole.device)) for p in whole[len(parts) :]]
    return torch.stack([*parts, *idle])


def _remember_width(module: nn.Module, old: int, new: int) -> None:
    """Follow integers by which a module remembers the width of its experts."""
    for name in _WIDTHS:
        if vars(module).get(name) == old:
            setattr(module, name, new)
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 3:  # one projection of all experts
        for name, size in zip(("output_size", "input_size"), weight.shape[1:], strict=True):
            if name in vars(module):
                setattr(module, name, size)
