"""The FFN sites of a model, and the selection of some of them by pattern."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ffnscope.errors import LayoutError, UsageError
from ffnscope.ffn.experts import find_experts
from ffnscope.ffn.guard import check_model
from ffnscope.ffn.probe import Found, layer_path, probe
from ffnscope.ffn.projection import in_width, is_projection, out_width
from ffnscope.types import FFNSite

PROBE_TOKENS = 8
WRAPPERS = ("model", "module", "base_model", "language_model", "transformer")


def find_sites(model: nn.Module, tracked: Sequence[str] | None = None) -> list[FFNSite]:
    """Find every FFN of a causal LM, dense ones and experts, in the order of its layers.

    Args:
        model: a `transformers` causal LM, on any device. It is run once on 8 tokens and left as it was.
        tracked: patterns that select sites (see `select_sites`); None selects all.

    Raises:
        LayoutError: the model has no FFN that this version can address, or experts of an unknown kind.
        ModelError: a quantised, adapter-wrapped, tensor-parallel or compiled model.
        UsageError: a pattern matches nothing.
    """
    check_model(model)
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    ids = torch.arange(PROBE_TOKENS, device=_input_device(model))[None] % text.vocab_size
    sites = [_site(model, f, _activation(text)) for f in probe(model, ids)]
    experts = find_experts(model, ids, _activation(text))
    if experts.refused:
        path, reason = next(iter(experts.refused.items()))
        raise LayoutError(
            f"{type(model).__name__} is a mixture of experts that cannot be used. {path}: {reason}. Pruning only its "
            "other FFNs is not available in this version."
        )
    if not sites and not experts.sites:
        raise LayoutError(
            f"no FFN with channels was found in {type(model).__name__} (model_type {text.model_type!r}): no projection "
            "reads an element-wise function of other projections. Run `ffnscope inspect` on a supported layout, or "
            "report the architecture."
        )
    _refuse_partial(model, sites)
    _refuse_shared(model, sites)
    sites = _in_model_order(model, [*sites, *experts.sites])
    return sites if tracked is None else select_sites(sites, tracked)


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
        hits = [s for s in sites if any(_matches(pattern, name) for name in (*s.projections, s.path, s.name))]
        if not hits:
            example = sites[0].projections[-1] if sites else "none"
            raise UsageError(
                f"tracked layer pattern {pattern!r} matches no FFN projection of this model; a name looks like "
                f"{example!r} ('*' = any number, '[0-3]' = a range)."
            )
        chosen.update(hits)
    return [s for s in sites if s in chosen]


def _input_device(model: Any) -> torch.device:
    """Where token ids go; an offloaded embedding (on meta) takes them from the CPU."""
    device: torch.device = next(model.get_input_embeddings().parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


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


def _site(model: nn.Module, found: Found, activation: str) -> FFNSite:
    names = [n for n in (found.gate, found.up, found.down) if n is not None]
    parents = [n.split(".")[:-1] for n in names]
    shortest = min(len(p) for p in parents)
    cut = next((i for i in range(shortest) if len({p[i] for p in parents}) > 1), shortest)
    relative = [None if n is None else ".".join(n.split(".")[cut:]) for n in (found.gate, found.up, found.down)]
    down = model.get_submodule(found.down)
    return FFNSite(
        layer=int(found.layer.rsplit(".", 1)[-1]),
        path=".".join(parents[0][:cut]),
        gate=relative[0],
        up=relative[1] or "",
        down=relative[2] or "",
        d_model=out_width(down),
        d_ff=in_width(down),
        activation=activation,
        fused=found.fused,
    )


def _activation(text_config: Any) -> str:
    for name in ("hidden_act", "hidden_activation", "activation_function", "activation"):
        value = getattr(text_config, name, None)
        if isinstance(value, str):
            return value
    return "unknown"


def _in_model_order(model: nn.Module, sites: Sequence[FFNSite]) -> list[FFNSite]:
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(sites, key=lambda s: order[s.path if s.expert is not None else s.projections[-1]])


def _refuse_partial(model: nn.Module, sites: Sequence[FFNSite]) -> None:
    """A layer whose FFN has the names of the others but does not compute like them would be left out silently."""
    found = {site.projections[-1] for site in sites}
    wanted = {_in_any_layer(name) for name in found}
    for name, module in model.named_modules():
        if is_projection(module) and name not in found and _in_any_layer(name) in wanted:
            raise LayoutError(
                f"{name} of {type(model).__name__} is named like the down projection of other layers, but its channels "
                "are not independent of each other; pruning only the other layers is not available in this version."
            )


def _in_any_layer(name: str) -> tuple[str, str]:
    """List of layers that a module is in, and its path inside the layer."""
    layer = layer_path(name) or ""
    return layer.rpartition(".")[0], name.removeprefix(layer)


def _refuse_shared(model: nn.Module, sites: Sequence[FFNSite]) -> None:
    """Two sites that share a weight cannot lose different channels, and masking one would change the other."""
    owners: dict[int, str] = {}
    for site in sites:
        for name in site.projections:
            for parameter in model.get_submodule(name).parameters(recurse=False):
                other = owners.setdefault(id(parameter), name)
                if other != name:
                    raise LayoutError(
                        f"{other} and {name} of {type(model).__name__} share their weights; FFNs that several layers "
                        "share are not available in this version."
                    )
