"""Experts in parameters that they share: no module of an expert could read fewer rows, so they run under the mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ffnscope.errors import LayoutError
from ffnscope.ffn.expert_calls import Call, Experts, Part, group_experts, observed_forward
from ffnscope.sparse.uses import Selection
from ffnscope.types import FFNSite


class SharedExperts:
    """A module of fused experts whose forward masks h of those that have a selection."""

    def __init__(self, model: nn.Module, experts: Experts):
        self._module = model.get_submodule(experts.path)
        self._own = vars(self._module).get("forward")
        self._selections: dict[int, Selection] = {}
        self._masks: dict[int, Tensor] = {}
        self._module.forward = observed_forward(self._module, experts, self._observe)

    def put(self, number: int, selection: Selection) -> None:
        """Mask an expert from now on."""
        self._selections[number] = selection

    def take(self, number: int) -> bool:
        """Mask an expert no more; without any, the module is as it was. Returns whether that is so."""
        del self._selections[number]
        if self._selections:
            return False
        if self._own is None:
            del vars(self._module)["forward"]
        else:
            self._module.forward = self._own
        return True

    def _observe(self, call: Call, run: Callable[[Tensor], Tensor]) -> Tensor:
        parts = [p for p in call.parts if p.expert in self._selections and p.tokens.numel()]
        if call.is_down:
            h = call.x
            for part in parts:
                h = _masked(h, part, self._masks.pop(part.expert, None))
            return run(h)
        if call.name == call.experts.producers[0]:
            for part in parts:
                self._masks.pop(part.expert, None)  # of a call that was cut off
                selection, x = self._selections[part.expert], part.rows(call.x)
                if selection.applies(x):
                    self._masks[part.expert] = selection.choose(x).mask
        return run(call.x)


def _masked(h: Tensor, part: Part, mask: Tensor | None) -> Tensor:
    """The input of down, in which the rows [n, d_ff] of an expert are masked by [n, d_ff]."""
    if mask is None:
        return h
    rows = part.rows(h)
    if rows.shape != mask.shape:
        raise LayoutError(
            f"the down projection of an expert is given {tuple(rows.shape)}, and the mask of its tokens is "
            f"{tuple(mask.shape)}"
        )
    kept = torch.where(mask, rows, 0.0)
    return kept if part.slot is None else h.index_put((torch.tensor(part.slot, device=h.device), part.tokens), kept)


class ExpertUse:
    """One expert of a module; `undo` puts back what was there. ``held`` has the modules that are replaced, by path."""

    def __init__(self, model: nn.Module, site: FFNSite, selection: Selection, held: dict[str, SharedExperts]):
        (experts,) = group_experts([site])
        assert site.expert is not None
        self._held, self._path, self._number = held, experts.path, site.expert
        if experts.path not in held:
            held[experts.path] = SharedExperts(model, experts)
        held[experts.path].put(site.expert, selection)

    def undo(self) -> None:
        """Mask this expert no more."""
        if self._held[self._path].take(self._number):
            del self._held[self._path]
