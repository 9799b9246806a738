"""The FFN sites of a model, and the selection of some of them by pattern."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

from torch import nn

from ffnscope.errors import UsageError
from ffnscope.ffn.projection import modules_of
from ffnscope.ffn.survey import describe, nothing_found, survey
from ffnscope.types import FFNSite

WRAPPERS = ("model", "module", "base_model", "language_model", "transformer")


def find_sites(model: nn.Module, tracked: Sequence[str] | None = None) -> list[FFNSite]:
    """Find the FFNs of a causal LM, dense ones and experts, in the order of its layers.

    FFNs that cannot be cut are left out with a warning that names them and the reason; `survey` lists them.

    Args:
        model: a `transformers` causal LM, on any device. It is run once on 8 tokens and left as it was.
        tracked: patterns that select sites (see `select_sites`); None selects all.

    Raises:
        LayoutError: the model has no FFN that this version can address.
        ModelError: a quantised, adapter-wrapped, tensor-parallel or compiled model.
        UsageError: a pattern matches nothing.
    """
    found = survey(model)
    if not found.sites:
        raise nothing_found(model, found)
    if found.refused:
        warnings.warn(f"left whole in {found.model_class}: {describe(found.refused)}.", stacklevel=1)
    return list(found.sites) if tracked is None else select_sites(found.sites, tracked)


def select_sites(sites: Sequence[FFNSite], patterns: Sequence[str]) -> list[FFNSite]:
    """Select the sites that any pattern matches.

    A pattern is a module path of any projection, or of the FFN itself; ``*`` stands for digits, ``[a-b]`` for an
    integer range (both ends included). Whatever stands before the list of layers (``model.``) may be left out, and
    wrappers may be added.

    Raises:
        UsageError: a pattern matches no site, or a range is malformed.
    """
    chosen: set[FFNSite] = set()
    for pattern in patterns:
        hits = [s for s in sites if any(_matches(pattern, name) for name in (*modules_of(s), s.path, *s.twins, s.name))]
        if not hits:
            example = sites[0].projections[-1] if sites else "none"
            raise UsageError(
                f"tracked layer pattern {pattern!r} matches no FFN projection of this model; a name looks like "
                f"{example!r} ('*' = any number, '[0-3]' = a range)."
            )
        chosen.update(hits)
    return [s for s in sites if s in chosen]


def _matches(pattern: str, name: str) -> bool:
    prefix, rest = _split(pattern)
    found_prefix, found = _split(name)
    return prefix in ([], found_prefix) and _parts_match(rest, found)


def _split(name: str) -> tuple[list[str], list[str]]:
    """Split at the list of layers: what is before it, without wrappers, and the list with all that follows."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit() or "*" in part or "[" in part), 0)
    start = max(index - 1, 0)
    return [p for p in parts[:start] if p not in WRAPPERS], parts[start:]


def _parts_match(parts: list[str], wanted: list[str]) -> bool:
    return len(parts) == len(wanted) and all(_part_matches(p, w) for p, w in zip(parts, wanted, strict=True))


def _part_matches(part: str, wanted: str) -> bool:
    bounds = re.fullmatch(r"\[(\d+)-(\d+)\]", part)
    if bounds:
        return wanted.isdigit() and int(bounds[1]) <= int(wanted) <= int(bounds[2])
    if "[" in part or "]" in part:
        raise UsageError(f"{part!r} is not a range of layers; write '[a-b]' with two integers, for example '[0-7]'.")
    if part == "*":
        return wanted.isdigit()
    return re.fullmatch(re.escape(part).replace(r"\*", r"\d+"), wanted) is not None
