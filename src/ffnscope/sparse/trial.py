"""Before a model is wrapped: does an FFN that reads rows compute what the mask defines, on this very model?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ffnscope.errors import NonFiniteError
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.projection import down_projection, uses_of
from ffnscope.ffn.survey import probe_ids
from ffnscope.sparse.uses import Level, Selector
from ffnscope.types import FFNSite

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
COARSE = 0.05  # bfloat16 and float16
"""Largest difference from the masked output, as a share of its largest value."""


class Puts(Protocol):
    """What can let an FFN run at a level, and put it back."""

    def put(self, site: FFNSite, level: Level, selector: Selector | None = None) -> None:
        """Let it run."""
        ...

    def remove(self, site: FFNSite) -> None:
        """Put it back."""
        ...


def kinds_of(sites: Sequence[FFNSite]) -> list[list[FFNSite]]:
    """Sites whose paths differ in numbers only, and whose widths agree, together."""
    kinds: dict[tuple[Any, ...], list[FFNSite]] = {}
    for site in sites:
        place = tuple(part for part in site.path.split(".") if not part.isdigit())
        shape = (site.gate, site.up, site.down, site.d_model, site.d_ff, site.fused, site.norm, site.adapters)
        kinds.setdefault((place, *shape), []).append(site)
    return list(kinds.values())


def reached(model: Any, kind: Sequence[FFNSite]) -> FFNSite | None:
    """One of the sites of a kind that the trial's token reaches: any but for experts, which share the tokens."""
    if kind[0].expert is None:
        return kind[0]
    seen: list[FFNSite] = []

    def noting(site: FFNSite) -> Any:
        return lambda module, args: seen.append(site) if args[0].numel() else None

    handles = [down_projection(model, site).register_forward_pre_hook(noting(site)) for site in kind]
    try:
        with torch.no_grad(), frozen(model):
            model(input_ids=probe_ids(model, 1), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0] if seen else None


def differs(model: nn.Module, puts: Puts, site: FFNSite, level: Level) -> bool:
    """Whether an FFN at a level gives something else than under the mask, or fails, for half of its channels.

    The model runs on one token, twice.

    Raises:
        NonFiniteError: under the mask it gives NaN or infinity.
    """
    half = torch.randperm(site.d_ff, generator=torch.Generator().manual_seed(0)) < (site.d_ff + 1) // 2
    with torch.no_grad(), frozen(model):
        expected = _output(model, puts, site, "masked", level, half)
        if not all(bool(torch.isfinite(one).all()) for one in expected):
            raise NonFiniteError(
                f"{site.name} puts out NaN or infinity for one token. Look for NaN in the weights of the model; in "
                "float16 this is usually an overflow: load it in bfloat16 or float32."
            )
        try:
            found = _output(model, puts, site, level, level, half)
        except (RuntimeError, TypeError, ValueError, IndexError):  # the model's code, given k channels or one token
            return True
    if not expected or len(expected) != len(found):
        return True
    pairs = zip(found, expected, strict=True)
    return not all(f.shape == e.shape and _distance(f, e) <= _rounding(e) for f, e in pairs)


def _output(model: Any, puts: Puts, site: FFNSite, level: Level, seen_at: Level, mask: Tensor) -> list[Tensor]:
    """What the FFN gives at every use, as seen at the module that ``seen_at`` replaces."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    def select(x: Tensor) -> Tensor:
        return mask.to(x.device).expand(len(x), -1)

    uses = uses_of(site)
    watched = [model.get_submodule(u.path) if seen_at == "module" else down_projection(model, u) for u in uses]
    handles = [module.register_forward_hook(note) for module in watched]
    puts.put(site, level, select)
    try:
        model(input_ids=probe_ids(model, 1), use_cache=False)
    finally:
        puts.remove(site)
        for handle in handles:
            handle.remove()
    return seen


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def _rounding(expected: Tensor) -> float:
    largest = float(expected.double().abs().max()) if expected.numel() else 0.0
    return ROUNDING.get(expected.dtype, COARSE) * largest
