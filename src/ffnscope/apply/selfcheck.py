"""Before a model is cut: does cutting compute what masking computes, on this very model?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.apply.mask import masked
from ffnscope.apply.slice import slice_
from ffnscope.errors import LayoutError
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.projection import coupled
from ffnscope.ffn.survey import probe_ids
from ffnscope.types import Budget, FFNSite, PruningPlan

TOKENS, REMOVED = 16, 0.5
# largest difference between cut and masked outputs, as a share of what masking does to them
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
COARSE = 0.1  # bfloat16 and float16


@dataclass(frozen=True, slots=True)
class CutCheck:
    """One site that was tried: how far masking moves the FFN's output, and how far cutting is from masking."""

    site: FFNSite
    effect: float
    difference: float


def check_cut(model: nn.Module, sites: Sequence[FFNSite], *, seed: int = 0) -> list[CutCheck]:
    """Mask a random half of the channels of one site of each kind, cut the same ones, and compare the FFN's output.

    The model is run on 16 tokens, three times for the first site and twice for each other, and stays as it was: what
    is cut is a second model that shares every weight but those of the tried site. Sites are of one kind when their
    paths differ in layer numbers only and their widths agree. Experts of one layer are tried together.

    Raises:
        LayoutError: cutting computes something else than masking, so `slice_` would damage the model.
    """
    ids = probe_ids(model, TOKENS)
    checks: list[CutCheck] = []
    with torch.no_grad(), frozen(model):
        for site in _one_of_each_kind(sites):
            plan = _random_halves(_cut_together(site, sites), seed)
            dense = _output(model, site, ids)
            with masked(model, plan):
                expected = _output(model, site, ids)
            found = _output_when_cut(model, plan, site, ids)
            check = CutCheck(site, _distance(expected, dense), _distance(found, expected))
            if not check.difference <= ROUNDING.get(dense.dtype, COARSE) * check.effect:
                raise _cannot_be_cut(
                    model,
                    site,
                    f"with a random half of its channels cut, its output differs by {check.difference:.2g} from that "
                    f"with the same channels masked (masking moves it by {check.effect:.2g}); expected no difference",
                )
            checks.append(check)
    return checks


def _one_of_each_kind(sites: Sequence[FFNSite]) -> list[FFNSite]:
    kinds: dict[tuple[Any, ...], FFNSite] = {}
    for site in sites:
        place = tuple(part for part in site.path.split(".") if not part.isdigit())
        kinds.setdefault((place, site.gate, site.up, site.down, site.d_ff, site.fused), site)
    return list(kinds.values())


def _cut_together(site: FFNSite, sites: Sequence[FFNSite]) -> list[FFNSite]:
    """Experts of one layer share tensors or tokens, so they are cut together; any other site is cut alone."""
    return [site] if site.expert is None else [s for s in sites if s.expert is not None and s.group == site.group]


def _random_halves(sites: Sequence[FFNSite], seed: int) -> PruningPlan:
    random = torch.Generator().manual_seed(seed)
    kept: dict[FFNSite, Tensor] = {}
    for site in sites:
        order = torch.randperm(site.d_ff, generator=random)
        kept[site] = order[: max(1, round(site.d_ff * (1 - REMOVED)))].sort().values
    return PruningPlan(kept, "random", "local", Budget(REMOVED))


def _output(model: Any, site: FFNSite, ids: Tensor) -> Tensor:
    """What the module of a site gives at every use; of an expert in a list, the module that holds the list."""
    path = site.path if site.expert is None or site.stacked else site.group.rpartition(".")[0]
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [model.get_submodule(p).register_forward_hook(note) for p in (path, *site.twins)]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat([one.flatten() for one in seen])


def _output_when_cut(model: nn.Module, plan: PruningPlan, site: FFNSite, ids: Tensor) -> Tensor:
    try:
        with warnings.catch_warnings():
            # half of the channels need not be a width that experts can have; zeroing the surplus is checked as well
            warnings.filterwarnings("ignore", message="experts of one layer lie in one tensor")
            cut = slice_(_sharing(model, list(plan.kept)), plan)
        return _output(cut, site, ids)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # something beside gate, up and down is as wide as the channels
        raise _cannot_be_cut(model, site, f"with a random half of its channels cut, it fails with: {error}") from error


def _sharing(model: nn.Module, sites: Sequence[FFNSite]) -> nn.Module:
    """A second model with the same tensors, but copies of those of some sites."""
    entries = chain.from_iterable(coupled(model, s, torch.arange(s.d_ff)) for s in sites)
    own = {id(getattr(entry.module, entry.name)) for entry in entries}
    tensors = chain(model.parameters(), model.buffers(), *(vars(m).values() for m in model.modules()))
    return copy.deepcopy(model, {id(t): t for t in tensors if isinstance(t, Tensor) and id(t) not in own})


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _cannot_be_cut(model: Any, site: FFNSite, why: str) -> LayoutError:
    return LayoutError(
        f"{site.name} of {type(model).__name__} (model_type {model.config.model_type!r}) cannot be cut: {why}. Its "
        "channels depend on something that the detection does not see. The model was not changed. Leave these layers "
        "out (tracked layers), or report the architecture."
    )
