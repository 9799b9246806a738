"""What experts cost: how many of them a token uses, and how many a decode step reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.calibrate.taps import channel_taps
from ffnscope.errors import NotAvailableError
from ffnscope.evaluate.forward import evaluating
from ffnscope.ffn.expert_calls import group_experts
from ffnscope.ffn.expert_lists import expert_lists
from ffnscope.ffn.probe import layer_path
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.survey import probe_ids
from ffnscope.types import FFNSite

ROUTED_TOKENS = 32


@dataclass(frozen=True, slots=True)
class ActiveExperts:
    """Experts that are in use, as means over the layers that have any.

    Attributes:
        total: experts of a layer.
        per_token: experts that a token is given to, counted over the first token ids of the vocabulary.
        per_step: experts whose weights one decode step reads. For one sequence these are ``per_token``; for several,
            what is expected when their tokens choose independently and every expert is as likely.
    """

    total: float
    per_token: float
    per_step: float


@dataclass(frozen=True, slots=True)
class ExpertCosts:
    """Costs of a model's experts; sums over its layers.

    Attributes:
        entries: of the matrices of all experts.
        active_entries: of those that a token is multiplied with.
        idle_bytes: of parameters of experts that one decode step does not read.
        active: how many experts these are.
    """

    entries: int
    active_entries: int
    idle_bytes: int
    active: ActiveExperts


def expert_costs(model: nn.Module, sites: Sequence[FFNSite], batch_size: int) -> ExpertCosts | None:
    """Count what the experts of a model cost; None when it has none. It is run once on a few tokens.

    Raises:
        NotAvailableError: parts of the model are named as experts, but it is not known how many tokens they get.
        LayoutError: it cannot be told which tokens an expert is given.
    """
    _check_all_known(model, sites)
    groups: dict[str, list[FFNSite]] = {}
    for site in sites:
        if site.expert is not None:
            groups.setdefault(site.group, []).append(site)
    if not groups:
        return None
    used = _used(model, [s for group in groups.values() for s in group])
    entries, active_entries, idle = 0, 0.0, float(unused_parameters(model, sites)) * _itemsize(model, sites)
    totals: list[tuple[float, float, float]] = []
    for group in groups.values():
        n, per_token = len(group), sum(used.get(s, 0) for s in group) / ROUTED_TOKENS
        per_step = n * (1 - (1 - per_token / n) ** batch_size)
        sizes = [_sizes(model, s) for s in group]
        entries += sum(matrix for matrix, _ in sizes)
        active_entries += per_token / n * sum(matrix for matrix, _ in sizes)
        idle += (1 - per_step / n) * sum(size for _, size in sizes)
        totals.append((n, per_token, per_step))
    active = ActiveExperts(*(sum(column) / len(totals) for column in zip(*totals, strict=True)))
    return ExpertCosts(entries, round(active_entries), round(idle), active)


def unused_parameters(model: nn.Module, sites: Sequence[FFNSite]) -> int:
    """Rows of fused producers beyond the experts of down (LongCat's experts that compute nothing); of no FFN."""
    unused = 0
    for experts in group_experts(sites):
        module = model.get_submodule(experts.path)
        n_experts = module.get_parameter(experts.down).shape[0]
        unused += sum(module.get_parameter(name)[n_experts:].numel() for name in experts.producers)
    return unused


def _used(model: nn.Module, sites: Sequence[FFNSite]) -> dict[FFNSite, int]:
    """How many of a few tokens every expert is given."""
    used: dict[FFNSite, int] = {}

    def note(site: FFNSite, tokens: Tensor) -> None:
        used[site] = used.get(site, 0) + tokens.numel()

    runner: Any = model
    with evaluating(model), torch.inference_mode(), channel_taps(model, sites, None, on_routing=note):
        runner(input_ids=probe_ids(model, ROUTED_TOKENS), use_cache=False)
    return used


def _sizes(model: nn.Module, site: FFNSite) -> tuple[int, int]:
    """Entries of an expert's matrices, and bytes of all its parameters."""
    w = weights_of(model, site)
    matrices = [part for part in (w.gate, w.up, w.down) if part is not None]
    biases = [part for part in (w.gate_bias, w.up_bias, w.down_bias) if part is not None]
    return sum(m.numel() for m in matrices), sum(part.nbytes for part in (*matrices, *biases))


def _itemsize(model: nn.Module, sites: Sequence[FFNSite]) -> int:
    return weights_of(model, next(s for s in sites if s.expert is not None)).down.itemsize


def _check_all_known(model: nn.Module, sites: Sequence[FFNSite]) -> None:
    known = {f"{s.path}.{name}" for s in sites if s.stacked for name in (s.gate, s.up, s.down) if name is not None}
    lists = set(expert_lists(model)) - {s.group for s in sites}
    stacks = {
        name
        for name, parameter in model.named_parameters()
        if "expert" in name and parameter.dim() == 3 and layer_path(name) is not None and name not in known
    }
    unknown = sorted(lists) or sorted(stacks)
    if unknown:
        raise NotAvailableError(
            f"{unknown[0]} of {type(model).__name__} is named like experts, but is none of the FFNs that were found, "
            "so it is not known how many tokens it computes. FLOPs and bytes of such models are not available."
        )
