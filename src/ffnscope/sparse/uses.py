"""One FFN whose forward reads only the channels that are selected for a token.

Where a module is the FFN and nothing else, its forward is replaced by one call of the kernel. Elsewhere the forwards of
its projections are: gate and up then give the k selected channels instead of d_ff, the model's own code computes h of
these, and down reads k. That serves every layout whose code does not name its width; the rest is masked and dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from ffnscope.errors import UsageError
from ffnscope.ffn.projection import channel_readers, down_projection, out_axis, producer_rows, projection
from ffnscope.sparse.kernels.ffn import RowWeights, sparse_ffn
from ffnscope.sparse.kernels.rows import RowMatrix
from ffnscope.sparse.products import Products
from ffnscope.types import FFNSite

Selector = Callable[[Tensor], Tensor]
"""x [T, d_model] of T tokens -> mask [T, d_ff] of bool, True = keep."""


@runtime_checkable
class Reader(Protocol):
    """A selector that tells which products it has made for all channels, so that the runtime need not make them."""

    def select_and_read(self, x: Tensor) -> tuple[Tensor, Products]:
        """x [T, d_model] -> mask [T, d_ff], and products [T, d_ff] with gate or up; none where it has made none."""
        ...


Level = Literal["module", "projections", "masked"]
"""What runs an FFN: one kernel for the whole module, one per projection, or dense products and a mask."""


@dataclass(slots=True)
class Step:
    """The forward that runs: how many tokens per sequence it was given, 0 when that is not known."""

    length: int = 0
    prefill: bool = False


@dataclass(slots=True)
class Counts:
    """Sums over decoding steps of one FFN.

    Attributes:
        tokens: that were decoded.
        selected: channels selected, over tokens.
        steps: calls of the FFN.
        union: share of channels that any token of a step selected, over steps.
        read: share of channels that were read, over steps: these, or all.
        sparse: steps that read only these; the others ran dense under the mask.
    """

    tokens: int = 0
    selected: int = 0
    steps: int = 0
    union: float = 0.0
    read: float = 0.0
    sparse: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Channels of one call.

    Attributes:
        mask: [T, d_ff].
        index: int32, of their union; None to run dense under the mask.
        known: products on the index [T, k] that the selector has made.
        whole: the mask keeps every channel, so what runs dense needs none.
    """

    mask: Tensor
    index: Tensor | None
    known: Products = field(default_factory=Products)
    whole: bool = False


@dataclass(slots=True, eq=False)
class Selection:
    """What decides about one FFN, at all its uses.

    Attributes:
        site: the FFN.
        selector: the rule.
        step: the forward that runs, shared by all FFNs of a model.
        limit: number of tokens -> largest density at which reading rows pays.
        counts: what happened.
    """

    site: FFNSite
    selector: Selector
    step: Step
    limit: Callable[[int], float]
    counts: Counts = field(default_factory=Counts)

    def applies(self, x: Tensor) -> bool:
        """Whether the forward that runs is one to select in; an expert may be given no token at all."""
        return x.numel() > 0 and (self.step.length == 1 or self.step.prefill)

    def choose(self, x: Tensor) -> Choice:
        """Select for tokens x [.., d_model].

        Raises:
            UsageError: the selector gave something else than a mask.
        """
        flat = x.detach().reshape(-1, x.shape[-1])
        mask, known = self._select(flat)
        if mask.dtype != torch.bool or mask.shape != (flat.shape[0], self.site.d_ff):
            raise UsageError(
                f"the selector of {self.site.name} gave {mask.dtype} {tuple(mask.shape)}; expected torch.bool "
                f"{(flat.shape[0], self.site.d_ff)} = (T, d_ff), True for channels to keep."
            )
        index = _nonzero(mask[0] if mask.shape[0] == 1 else mask.any(0))
        if self.step.length != 1 or torch.is_grad_enabled():
            return Choice(mask, None)
        density = index.numel() / self.site.d_ff
        sparse = density <= self.limit(flat.shape[0])
        self._count(mask, index, density, sparse)
        if not sparse:
            return Choice(mask, None, whole=len(mask) == 1 and index.numel() == self.site.d_ff)
        return Choice(mask, index, known.at(index, x.dtype))

    def _select(self, x: Tensor) -> tuple[Tensor, Products]:
        return self.selector.select_and_read(x) if isinstance(self.selector, Reader) else (self.selector(x), Products())

    def _count(self, mask: Tensor, index: Tensor, density: float, sparse: bool) -> None:
        self.counts.tokens += mask.shape[0]
        self.counts.selected += index.numel() if mask.shape[0] == 1 else int(mask.sum())
        self.counts.steps += 1
        self.counts.union += density
        self.counts.read += density if sparse else 1.0
        self.counts.sparse += sparse


def masked(h: Tensor, mask: Tensor) -> Tensor:
    """h [.., d_ff] with zeros where the mask [T, d_ff] is False, whatever was there."""
    return torch.where(mask.view(h.shape), h, 0.0)  # a product with bools takes twice as long for many tokens


def _nonzero(mask: Tensor) -> Tensor:
    if mask.device.type != "cpu":
        return mask.nonzero().flatten().int()
    return torch.from_numpy(np.flatnonzero(mask.numpy()).astype(np.int32))  # several times faster than nonzero


class Use:
    """One place where an FFN runs; `put` replaces forwards, `undo` puts back what was there."""

    def __init__(self, model: nn.Module, site: FFNSite, selection: Selection):
        self.site, self.selection = site, selection
        self._choice: Choice | None = None
        self._undo: list[Callable[[], None]] = []
        for reader in channel_readers(model, site):
            self._undo.append(reader.register_forward_pre_hook(self._mask).remove)

    def undo(self) -> None:
        """Put back the forwards and take the hooks away."""
        while self._undo:
            self._undo.pop()()

    def replace(self, module: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Replace the forward of a module; returns the one that it had."""
        before, own = module.forward, vars(module).get("forward")
        module.forward = forward

        def restore() -> None:
            if own is None:
                del vars(module)["forward"]
            else:
                module.forward = own

        self._undo.append(restore)
        return before

    def _mask(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Where a call runs dense, mask h [.., d_ff] before down, or the norm before it, reads it."""
        choice = self._choice
        if choice is None or choice.index is not None:
            return None
        self._choice = None
        if choice.whole:
            return None
        return (masked(args[0], choice.mask), *args[1:])


class ModuleUse(Use):
    """A module that is the whole FFN: one kernel call."""

    def __init__(self, model: nn.Module, site: FFNSite, selection: Selection, weights: RowWeights, act: str):
        super().__init__(model, site, selection)
        self._weights, self._act = weights, act
        self.dense = self.replace(model.get_submodule(site.path), self._forward)

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._choice = None  # of a call that was cut off
        if args or kwargs or not self.selection.applies(x):
            return self.dense(x, *args, **kwargs)
        choice = self.selection.choose(x)
        if choice.index is None:
            self._choice = choice
            return self.dense(x)
        flat = x.reshape(-1, x.shape[-1])
        token_mask = None if len(flat) == 1 else choice.mask[:, choice.index]
        some = sparse_ffn(flat, self._weights, choice.index, self._act, token_mask=token_mask, known=choice.known)
        return some.view(x.shape)

    def under(self, mask: Tensor, x: Tensor) -> Tensor:
        """The FFN under a mask [T, d_ff], for timing."""
        self._choice = Choice(mask, None)
        return self.dense(x)

    def sparse(self, x: Tensor, index: Tensor, known: Products | None = None) -> Tensor:
        """The FFN on some channels, for timing."""
        return sparse_ffn(x, self._weights, index, self._act, known=known or Products())


class ProjectionUse(Use):
    """Projections one by one. With ``rows`` None, everything runs dense under the mask."""

    def __init__(self, model: nn.Module, site: FFNSite, selection: Selection, rows: dict[str, RowMatrix] | None):
        super().__init__(model, site, selection)
        self._rows = rows
        self._seen: set[str] = set()
        self._names = tuple(dict.fromkeys(n for n in (site.gate, site.up) if n is not None))
        self._modules = {name: projection(model, site, name) for name in self._names}
        self._down = down_projection(model, site)
        self._forwards = {n: self.replace(m, self._producer(n)) for n, m in self._modules.items()}
        self._forwards[site.down] = self.replace(self._down, self._read)

    def _producer(self, name: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if not self._seen or name in self._seen:  # the first of a call
                self._seen.clear()
                self._choice = self._choose(x)
            self._seen.add(name)
            choice = self._choice
            if choice is None or choice.index is None:
                return self._forwards[name](x)
            known = self._known(name, choice.known)
            if known is not None:
                return known.view(*x.shape[:-1], -1)
            return self._some(name, x.reshape(-1, x.shape[-1]), choice.index).view(*x.shape[:-1], -1)

        return forward

    def _known(self, name: str, known: Products) -> Tensor | None:
        """What the selector has made of a projection; a fused one is read whole."""
        if self.site.fused is not None:
            return None
        return known.up if name == self.site.up else known.gate

    def _choose(self, x: Tensor) -> Choice | None:
        if not self.selection.applies(x):
            return None
        choice = self.selection.choose(x)
        if choice.index is None:
            return choice
        if self._rows is None:
            return Choice(choice.mask, None)
        # code that takes apart a fused gate and up cannot do so with nothing
        return choice if choice.index.numel() else Choice(choice.mask, choice.index.new_zeros(1))

    def _some(self, name: str, x: Tensor, index: Tensor) -> Tensor:
        assert self._rows is not None
        rows = producer_rows(self.site, index)
        found = self._rows[name].dot(x, rows)
        bias: Any = getattr(self._modules[name], "bias", None)
        return found if bias is None else found + bias.detach().index_select(0, rows)

    def _read(self, h: Tensor) -> Tensor:
        choice, self._choice = self._choice, None
        self._seen.clear()
        if choice is None or choice.index is None:
            return self._forwards[self.site.down](h)
        flat = h.reshape(-1, h.shape[-1])
        return self._sum(flat * choice.mask[:, choice.index], choice.index).view(*h.shape[:-1], -1)

    def _sum(self, h: Tensor, index: Tensor) -> Tensor:
        assert self._rows is not None
        y = self._rows[self.site.down].sum(h, index)
        bias: Any = getattr(self._down, "bias", None)
        return y if bias is None else y + bias.detach()

    def dense(self, x: Tensor) -> Tensor:
        """All products of the FFN, for timing."""
        h = [self._forwards[name](x) for name in self._names]
        return self._forwards[self.site.down](h[0][..., : self.site.d_ff])

    def under(self, mask: Tensor, x: Tensor) -> Tensor:
        """All products and a mask [T, d_ff], for timing."""
        h = [self._forwards[name](x) for name in self._names]
        return self._forwards[self.site.down](masked(h[0][..., : self.site.d_ff], mask))

    def sparse(self, x: Tensor, index: Tensor, known: Products | None = None) -> Tensor:
        """All products on some channels, for timing."""
        known = known or Products()
        made = {name: self._known(name, known) for name in self._names}
        h = [self._some(name, x, index) if made[name] is None else made[name] for name in self._names]
        first = h[0]
        assert first is not None
        return self._sum(first[:, : index.numel()], index)


def projection_rows(model: nn.Module, site: FFNSite) -> dict[str, RowMatrix]:
    """Gate and up (one matrix when fused) with outputs as rows, and down with channels as rows."""
    found: dict[str, RowMatrix] = {}
    for name in dict.fromkeys(n for n in (site.gate, site.up, site.down) if n is not None):
        module: Any = projection(model, site, name)
        rows_first = (out_axis(module) == 0) != (name == site.down)
        found[name] = RowMatrix(module.weight if rows_first else module.weight.T)
    return found
