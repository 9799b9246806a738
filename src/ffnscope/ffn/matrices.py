"""Weight matrices one by one: the projections of FFNs, or all linear modules of the decoder blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.errors import LayoutError, NotAvailableError
from ffnscope.ffn.offload import is_offloaded
from ffnscope.ffn.projection import Coupled, is_projection, out_axis, whole_expert
from ffnscope.types import FFNSite


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight matrix of a model.

    Attributes:
        path: path of the linear module; or, for an expert in shared parameters, of the parameter within ``site``.
        site: that expert, or None.
    """

    path: str
    site: FFNSite | None = None

    @property
    def name(self) -> str:
        """Unique name."""
        return self.path if self.site is None else f"{self.site.name}.{self.path}"

    def entry(self, model: nn.Module) -> tuple[Coupled, bool]:
        """All its entries, along axis 0, and whether it is stored as [out, in].

        Raises:
            LayoutError: it is not in this model.
            NotAvailableError: it is offloaded.
        """
        entry, outputs_first = self._module(model) if self.site is None else whole_expert(model, self.site, self.path)
        if is_offloaded(getattr(entry.module, entry.name)):
            raise NotAvailableError(
                f"{self.name} is offloaded by accelerate (or was never loaded); unstructured sparsity needs weights in "
                "memory. Load the model without offload."
            )
        return entry, outputs_first

    def weight(self, model: nn.Module) -> Tensor:
        """View [out, in] of the weights; see `entry` for what it raises."""
        entry, outputs_first = self.entry(model)
        stored = entry.parameter.detach()
        return stored if outputs_first else stored.T

    def _module(self, model: nn.Module) -> tuple[Coupled, bool]:
        try:
            module: Any = model.get_submodule(self.path)
        except AttributeError as error:
            raise LayoutError(f"{self.path} is not in this model; it was made for another model.") from error
        if not is_projection(module):
            raise LayoutError(f"{self.path} is no linear module in this model; it was made for another model.")
        return Coupled(module, "weight", 0, torch.arange(module.weight.shape[0])), out_axis(module) == 0


def matrices_of(site: FFNSite) -> dict[str, Matrix]:
    """Matrices of an FFN by the name of the projection within its site; gate and up are one when they are fused."""
    names = dict.fromkeys(n for n in (site.gate, site.up, site.down) if n is not None)
    if site.stacked:
        return {name: Matrix(name, site) for name in names}
    return {name: Matrix(f"{site.path}.{name}" if site.path else name) for name in names}


def linear_modules(model: nn.Module, blocks: Sequence[str]) -> list[Matrix]:
    """Every Linear or Conv1D inside modules of these paths, in the order of the model."""
    inside = tuple(f"{path}." for path in blocks)
    return [Matrix(name) for name, module in model.named_modules() if name.startswith(inside) and is_projection(module)]


def check_apart(model: nn.Module, matrices: Sequence[Matrix]) -> None:
    """Raise NotAvailableError where two matrices are one parameter."""
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    for matrix in matrices:
        weight = matrix.weight(model)
        place = weight.data_ptr(), tuple(weight.shape)
        if place in seen:
            raise NotAvailableError(
                f"{matrix.name} and {seen[place]} are one parameter with inputs of its own at each place; "
                "unstructured sparsity supports matrices that are used once."
            )
        seen[place] = matrix.name
