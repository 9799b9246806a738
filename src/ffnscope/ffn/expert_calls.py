"""Watch what fused experts compute: every product with one expert's slice of a shared parameter, as it happens.

Fused experts have no module per expert that a hook could be put on. Their forward picks the tokens of each expert and
multiplies them with a slice of a parameter, so both are read off the operations: which parameter and expert from the
memory that the weight lies in, which tokens from the index that picked the rows. Nothing is recomputed or assumed
about the router.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ffnscope.errors import LayoutError
from ffnscope.ffn.picks import Picks
from ffnscope.types import FFNSite

_PRODUCTS = ("linear", "matmul", "bmm", "mm", "__matmul__")
PICKS = ("__getitem__", "index_select")


@dataclass(frozen=True, slots=True)
class Experts:
    """Fused experts of one module.

    Attributes:
        path: module that is given the tokens.
        producers: parameters of gate and up, relative to ``path``; one name when they are fused, or there is no gate.
        down: parameter of down, relative to ``path``.
        d_ff: rows per expert of a flat parameter [n_experts * d_ff, d_model]; None for a 3-D one.
    """

    path: str
    producers: tuple[str, ...]
    down: str
    d_ff: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one expert has of a product: its slot in a batched one (else None), and its tokens in batch * time."""

    expert: int
    slot: int | None
    tokens: Tensor

    def rows(self, signal: Tensor) -> Tensor:
        """Rows of the product's input or output that belong to this expert's tokens, [n, width]."""
        return signal if self.slot is None else signal[self.slot].index_select(0, self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One product of tokens with the slices of one parameter that belong to ``parts``.

    ``x`` is [n, width], or [n_experts, n_tokens, width] where all experts are multiplied at once. ``contracts_last``
    tells whether the sum runs over the last axis of the parameter.
    """

    experts: Experts
    name: str
    x: Tensor
    parts: tuple[Part, ...]
    contracts_last: bool

    @property
    def is_down(self) -> bool:
        """Whether this is the down projection, whose input is the channel activation."""
        return self.name == self.experts.down


Observe = Callable[[Call, Callable[[Tensor], Tensor]], Tensor]
"""Given a call and the product as a function of x; returns the product."""


def group_experts(sites: Iterable[FFNSite]) -> dict[Experts, dict[int, FFNSite]]:
    """The experts in shared parameters among ``sites``, by the fused experts that they belong to and their index."""
    groups: dict[Experts, dict[int, FFNSite]] = {}
    for site in sites:
        if site.stacked and site.expert is not None:
            producers = tuple(dict.fromkeys(n for n in (site.gate, site.up) if n is not None))
            experts = Experts(site.path, producers, site.down, site.d_ff if site.storage == "flat" else None)
            groups.setdefault(experts, {})[site.expert] = site
    return groups


def stored_together(sites: Iterable[FFNSite]) -> list[list[FFNSite]]:
    """Sites in groups that share parameters: the experts of a layer in one tensor, any other site alone."""
    every = list(sites)
    together = [list(group.values()) for group in group_experts(every).values()]
    return [*together, *([site] for site in every if not site.stacked)]


@contextlib.contextmanager
def expert_calls(model: nn.Module, experts: Sequence[Experts], observe: Observe) -> Generator[set[Experts]]:
    """Within the block, every product of these experts goes through ``observe``.

    Yields the set of those that have been given tokens so far. Their plain loop ("eager") is used instead of a grouped
    kernel. All is as before on exit, also after an exception.

    Raises:
        LayoutError: inside the block, when the tokens of a product cannot be told.
    """
    if not experts:
        yield set()
        return
    watch = _Watch(observe)
    handles: list[Any] = []
    modules = [model.get_submodule(e.path) for e in experts]
    try:
        for one, module in zip(experts, modules, strict=True):
            handles.append(module.register_forward_pre_hook(watch.opener(one), with_kwargs=True))
            handles.append(module.register_forward_hook(watch.close))
        with _eager(modules), watch:
            yield watch.opened
    finally:
        for handle in handles:
            handle.remove()


def observed_forward(module: nn.Module, experts: Experts, observe: Observe) -> Callable[..., Any]:
    """The forward that a module of fused experts has now, with all its products going through ``observe``.

    As `expert_calls`, but for a caller that puts it in the place of the forward.
    """
    before = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        watch = _Watch(observe)
        watch.opener(experts)(module, args, kwargs)
        with _eager([module]), watch:
            return before(*args, **kwargs)

    return forward


@contextlib.contextmanager
def _eager(modules: Sequence[nn.Module]) -> Generator[None]:
    configs: dict[int, Any] = {}
    for module in modules:
        config = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            configs[id(config)] = config
    before = [(c, c._experts_implementation) for c in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation = {"": "eager"}  # of this config alone, not of those inside it
        yield
    finally:
        for config, name in before:
            config._experts_implementation = {"": name}


@dataclass(slots=True, eq=False)
class _Frame:
    """One running forward of fused experts: rows that were picked from its tokens, and what each expert was given."""

    experts: Experts
    module: nn.Module
    picks: Picks
    routed: dict[int, Part] = field(default_factory=dict[int, Part])

    def call(self, x: Any, weight: Any, axis: int) -> Call | None:
        """Tell what a product is, when its weight is a slice of the experts' parameters; ``axis`` is summed over."""
        if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or weight.dim() not in (2, 3):
            return None
        for name in (*self.experts.producers, self.experts.down):
            first = self._first_expert(weight, name)
            if first is not None:
                return self._call(name, first, x, weight, axis)
        return None

    def _call(self, name: str, first: int, x: Tensor, weight: Tensor, axis: int) -> Call:
        if name != self.experts.down:
            for part in self._batched(x) if weight.dim() == 3 else (Part(first, None, self._tokens(x)),):
                self.routed[part.expert] = part
        numbers = range(weight.shape[0]) if weight.dim() == 3 else (first,)
        if any(e not in self.routed for e in numbers):
            raise LayoutError(
                f"{self.experts.path}.{name} is multiplied with channels that come from no product with "
                f"{' or '.join(self.experts.producers)}"
            )
        parts = tuple(self.routed[e] for e in numbers)
        return Call(self.experts, name, x, parts, self._is_last(weight, axis, name))

    def _is_last(self, weight: Tensor, axis: int, name: str) -> bool:
        """Whether an axis of a slice is the last axis of the parameter: by length, or by stride when that is square."""
        parameter = self.module.get_parameter(name)
        rows = self.experts.d_ff or parameter.shape[-2]
        return weight.stride(axis) == 1 if rows == parameter.shape[-1] else weight.shape[axis] == parameter.shape[-1]

    def _first_expert(self, weight: Tensor, name: str) -> int | None:
        """Index of the expert where ``weight`` begins in a parameter, or None when it lies elsewhere."""
        parameter = self.module.get_parameter(name)
        offset = weight.data_ptr() - parameter.data_ptr()
        if not 0 <= offset < parameter.numel() * parameter.itemsize:
            return None
        step = parameter.stride(0) * (self.experts.d_ff or 1)
        return offset // (step * parameter.itemsize)

    def _tokens(self, x: Tensor) -> Tensor:
        """Tokens of the rows of x, from the index that picked them; x may be a piece of what was picked."""
        tokens = self.picks.tokens(x)
        if tokens is not None:
            return tokens
        raise LayoutError(
            f"{self.experts.path}: the tokens that an expert is given cannot be told, because they are not picked by "
            "an index from the input of the experts"
        )

    def _batched(self, x: Tensor) -> tuple[Part, ...]:
        """Experts that are given all tokens at once: those that are not routed to an expert are zero there."""
        if x.dim() != 3 or x.shape[1] not in (self.picks.n_tokens, self.picks.n_tokens // x.shape[0]):
            raise LayoutError(
                f"{self.experts.path} multiplies {tuple(x.shape)} with all experts at once; expected [n_experts, "
                f"{self.picks.n_tokens}, width]"
            )
        routed = (x != 0).any(-1)
        return tuple(Part(e, e, one.nonzero().flatten()) for e, one in enumerate(routed))


class _Watch(TorchFunctionMode):
    def __init__(self, observe: Observe):
        super().__init__()
        self.observe = observe
        self.opened: set[Experts] = set()
        self._open: list[_Frame] = []

    def opener(self, experts: Experts) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            self.opened.add(experts)
            self._open.append(_Frame(experts, module, Picks(tokens.numel() // tokens.shape[-1])))

        return hook

    def close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._open.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        more: dict[str, Any] = kwargs or {}
        name = getattr(func, "__name__", "") if self._open else ""
        if name in PICKS:
            rows = func(*args, **more)
            self._open[-1].picks.note(args, more, rows)
            return rows
        call = None
        if name in _PRODUCTS and len(args) > 1:
            call = self._open[-1].call(*args[:2], axis=-1 if name == "linear" else -2)
        if call is None:
            return func(*args, **more)
        return self.observe(call, lambda x: func(x, *args[1:], **more))
