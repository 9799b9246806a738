"""Experts that are modules of their own, in a list: which ones there are, and which tokens each of them is given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ffnscope.errors import LayoutError
from ffnscope.ffn.expert_calls import PICKS
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.picks import Picks
from ffnscope.ffn.probe import Found, layer_path
from ffnscope.ffn.projection import in_width, out_width
from ffnscope.ffn.unread import unread_head
from ffnscope.types import FFNSite

OnTokens = Callable[[FFNSite, Tensor], None]


@dataclass(frozen=True, slots=True)
class ListedExperts:
    """Experts of the lists of a model: one site each; path of a list -> why its experts cannot be used; other FFNs."""

    sites: tuple[FFNSite, ...]
    refused: Mapping[str, str]
    others: tuple[Found, ...]


def expert_lists(model: nn.Module) -> dict[str, list[str]]:
    """Lists of routed experts within the layers: path -> names of the experts in it."""
    return {
        path: [name for name, _ in module.named_children()]
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.ModuleDict)
        and len(module) > 1
        and layer_path(path) is not None
        and "expert" in (last := path.rpartition(".")[2])
        and "shared" not in last
    }


def find_listed(model: nn.Module, ffns: Sequence[Found], input_ids: Tensor, activation: str) -> ListedExperts:
    """Tell the experts of lists from the other FFNs that the probe has found.

    An expert that too few tokens reached has the layout of its siblings, or of other lists when none of them was
    reached. Then ``input_ids`` [1, T] are run once more, to see whether the tokens of every expert can be told.
    """
    lists = expert_lists(model)
    inside: dict[str, list[Found]] = {path: [] for path in lists}
    others: list[Found] = []
    for ffn in ffns:
        inside.get(_list_of(ffn, lists) or "", others).append(ffn)
    sites: list[FFNSite] = []
    refused: dict[str, str] = {}
    for path, names in lists.items():
        relative = {_relative(f, path, names) for f in inside[path]}
        alike = relative or {_relative(f, p, lists[p]) for p, found in inside.items() for f in found}
        if len(alike) == 1 and all(_has(model, f"{path}.{name}", one) for one in alike for name in names):
            (one,) = alike
            sites += [_site(model, one, f"{path}.{name}", i, activation) for i, name in enumerate(names)]
        else:
            refused[path] = "its experts are modules of their own, and no common form of FFN was seen in them"
    if sites:
        try:
            with torch.no_grad(), frozen(model), unread_head(model), routed_tokens(model, sites, lambda *_: None):
                model(input_ids=input_ids, use_cache=False)
        except LayoutError as error:
            refused |= {site.group: str(error) for site in sites}
            sites = []
    return ListedExperts(tuple(sites), refused, tuple(others))


@contextlib.contextmanager
def routed_tokens(model: nn.Module, sites: Sequence[FFNSite], note: OnTokens) -> Generator[None]:
    """Within the block, call ``note`` with an expert and its tokens, int64 [n] in batch * T, before its channels come.

    Only for experts that are modules of their own; others among ``sites`` are passed over. All is as before on exit.

    Raises:
        LayoutError: inside the block, when the tokens of an expert cannot be told.
    """
    listed = [s for s in sites if s.expert is not None and not s.stacked]
    if not listed:
        yield
        return
    watch = _Watch()
    handles: list[Any] = []
    try:
        for path in dict.fromkeys(_block(site) for site in listed):
            block = model.get_submodule(path)
            handles.append(block.register_forward_pre_hook(watch.opener(path), with_kwargs=True))
            handles.append(block.register_forward_hook(watch.close))
        for site in listed:
            up = model.get_submodule(f"{site.path}.{site.up}")
            handles.append(up.register_forward_pre_hook(watch.reader(site, note)))
        with watch:
            yield
    finally:
        for handle in handles:
            handle.remove()


def _block(site: FFNSite) -> str:
    """Module that is given the tokens: the one that holds the list."""
    return site.group.rpartition(".")[0]


class _Watch(TorchFunctionMode):
    """Remembers which rows were picked from the input of the modules that run, innermost last."""

    def __init__(self) -> None:
        super().__init__()
        self._open: list[tuple[str, Tensor, Picks]] = []
        self._looking = False

    def opener(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            tokens = given.detach().reshape(-1, given.shape[-1])
            self._open.append((path, tokens, Picks(tokens.shape[0])))

        return hook

    def close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._open.pop()

    def reader(self, site: FFNSite, note: OnTokens) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            if x.numel():
                note(site, self._tokens(site, x.detach()))

        return hook

    def _tokens(self, site: FFNSite, x: Tensor) -> Tensor:
        path, given, picks = self._open[-1] if self._open else ("", x, Picks(0))
        index = picks.tokens(x) if path == _block(site) else None
        if index is not None and x.shape == (index.numel(), given.shape[1]):
            self._looking = True  # what is picked here is none of the model's
            same = _same(given.index_select(0, index.to(given.device)).to(x), x)
            self._looking = False
            if same:
                return index
        raise LayoutError(
            f"{site.group}: the tokens that an expert is given cannot be told, because they are not picked by an index "
            f"from the input of {_block(site)}"
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        more: dict[str, Any] = kwargs or {}
        out = func(*args, **more)
        if self._open and not self._looking and getattr(func, "__name__", "") in PICKS:
            self._open[-1][2].note(args, more, out)
        return out


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal; NaN equals NaN, so that an overflow is told as what it is."""
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _list_of(ffn: Found, lists: Mapping[str, Sequence[str]]) -> str | None:
    return next((path for path in lists if ffn.down.startswith(f"{path}.")), None)


def _relative(ffn: Found, path: str, names: Sequence[str]) -> Found:
    """An FFN with names relative to its expert."""
    expert = next(f"{path}.{name}." for name in names if ffn.down.startswith(f"{path}.{name}."))
    gate, norm = (None if name is None else name.removeprefix(expert) for name in (ffn.gate, ffn.norm))
    up, down, *adapters = (name.removeprefix(expert) for name in (ffn.up, ffn.down, *ffn.adapters))
    return Found("", gate, up, down, ffn.fused, norm, tuple(adapters))


def _has(model: nn.Module, expert: str, ffn: Found) -> bool:
    """Whether an expert has the projections of an FFN, in widths that fit to each other."""
    names = {name for name, _ in model.get_submodule(expert).named_modules()}
    producers = {n for n in (ffn.gate, ffn.up) if n is not None}
    if not {*producers, *ffn.adapters, ffn.norm or ffn.down, ffn.down} <= names:
        return False
    d_ff = in_width(model.get_submodule(f"{expert}.{ffn.down}")) * (2 if ffn.fused else 1)
    return all(out_width(model.get_submodule(f"{expert}.{n}")) == d_ff for n in producers)


def _site(model: nn.Module, ffn: Found, path: str, expert: int, activation: str) -> FFNSite:
    down = model.get_submodule(f"{path}.{ffn.down}")
    return FFNSite(
        layer=int((layer_path(path) or "0").rsplit(".", 1)[-1]),
        path=path,
        gate=ffn.gate,
        up=ffn.up,
        down=ffn.down,
        d_model=out_width(down),
        d_ff=in_width(down),
        activation=activation,
        fused=ffn.fused,
        expert=expert,
        storage="modules",
        norm=ffn.norm,
        adapters=ffn.adapters,
    )
