"""Everything that looks like an FFN in a model: the sites, and what is left out, by name and with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ffnscope.errors import LayoutError
from ffnscope.ffn.expert_lists import expert_lists, find_listed
from ffnscope.ffn.experts import find_experts
from ffnscope.ffn.guard import check_model
from ffnscope.ffn.probe import Found, Probed, layer_path, probe
from ffnscope.ffn.projection import in_width, is_projection, out_width
from ffnscope.ffn.shared import merge_shared
from ffnscope.types import FFNSite

PROBE_TOKENS, MOST_TOKENS = 8, 2048
# parts of a module path that tell a small helper network, which is built like an FFN, from the FFN of a layer
HELPERS = re.compile(r".*norm|.*router.*|gate|.*hyper_connection.*|.*_hc|altup|adapter_modules|patcher", re.IGNORECASE)
# word in the class names of layers that have no FFN at all -> what they have instead
WITHOUT_FFN = {"Mamba": "state-space mixers, whose input projection feeds a convolution and a scan over the tokens"}
# children of a module with experts that have no channels to choose from -> why they are left whole
RETRIEVAL = {
    ("down_embed", "up_embed"): "its experts are single channels in the rows of embeddings, of which a router picks a "
    "few per token; there is nothing to cut within them"
}


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A part of a model that is left whole: the path of its down projection (or of its module), and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found in a model.

    Attributes:
        model_class: name of the model's class.
        model_type: its type, as the config tells it.
        sites: the FFNs that can be scored and cut, in the order of the layers.
        refused: FFNs that cannot be, each with the reason.
        helpers: networks that are built like an FFN, but are none of a layer's (routers, adapters, gated norms).
    """

    model_class: str
    model_type: str
    sites: tuple[FFNSite, ...]
    refused: tuple[LeftOut, ...]
    helpers: tuple[LeftOut, ...]


def survey(model: nn.Module) -> Survey:
    """Look for FFNs in a causal LM, on any device. It is run on a few tokens and left as it was.

    Raises:
        ModelError: a quantised, adapter-wrapped, tensor-parallel or compiled model.
    """
    check_model(model)
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    activation = _activation(text)
    ids = probe_ids(model, _probe_length(model, text))
    seen, experts = probe(model, ids), find_experts(model, ids[:, :PROBE_TOKENS], activation)
    helpers = tuple(LeftOut(f.down, f"{_helper_part(f.down)} is a helper network") for f in seen.ffns if _is_helper(f))
    ffns = [f for f in seen.ffns if not _is_helper(f) and not _is_within(f.down, experts.refused)]
    listed = find_listed(model, ffns, ids, activation)
    ffns, told = listed.others, {**experts.refused, **listed.refused}
    modules, shared = merge_shared(model, [*(_site(model, f, activation) for f in ffns), *listed.sites])
    known = {f.down for f in seen.ffns} | {s.projections[-1] for s in listed.sites}
    unlike = {n: why for n, why in _unlike(model, ffns, known, seen).items() if not _is_within(n, told)}
    refused = [LeftOut(name, reason) for name, reason in {**unlike, **shared, **told, **_retrieval(model)}.items()]
    sites = tuple(_in_model_order(model, [*modules, *experts.sites]))
    return Survey(type(model).__name__, text.model_type, sites, tuple(refused), helpers)


def _probe_length(model: nn.Module, text_config: Any) -> int:
    """Tokens to look at: an FFN shows on four of them, and the experts of a list share them."""
    longest = max((len(names) for names in expert_lists(model).values()), default=1)
    positions = getattr(text_config, "max_position_embeddings", None)
    limit = positions if isinstance(positions, int) and positions >= PROBE_TOKENS else MOST_TOKENS
    return min(PROBE_TOKENS * longest, limit)


def describe(left_out: Iterable[LeftOut]) -> str:
    """One clause per reason, layers of the same name drawn together: ``model.layers.*.mlp.down_proj: why``."""
    rows: dict[tuple[str, str], int] = {}
    for one in left_out:
        key = (_any_number(one.path), _any_number(one.reason))
        rows[key] = rows.get(key, 0) + 1
    return "; ".join(f"{path}{f' ({n} times)' if n > 1 else ''}: {why}" for (path, why), n in rows.items())


def nothing_found(model: nn.Module, found: Survey) -> LayoutError:
    """Build the error for a model without a single site: what it has instead."""
    name = f"{found.model_class} (model_type {found.model_type!r})"
    if found.refused:
        return LayoutError(f"none of the FFNs of {name} can be cut. {describe(found.refused)}.")
    kinds = dict.fromkeys(type(m).__name__ for n, m in model.named_modules() if layer_path(n) and _has_children(m))
    known = next((what for word, what in WITHOUT_FFN.items() if any(word in kind for kind in kinds)), None)
    if known is not None:
        return LayoutError(f"no FFN with channels is in {name}: its layers are {known}. There is nothing to cut.")
    return LayoutError(
        f"no FFN with channels was found in {name}: no projection of its layers ({', '.join(kinds) or 'none'}) reads "
        "an element-wise function of other projections. Please report the architecture."
    )


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None and not isinstance(module, nn.ModuleList)


def probe_ids(model: Any, length: int) -> torch.Tensor:
    """Token ids [1, length], or [codebooks, length] for a model with one embedding per codebook."""
    tables = model.get_input_embeddings()
    device: torch.device = next(tables.parameters()).device
    # an offloaded embedding (on meta) takes its ids from the CPU
    where = torch.device("cpu") if device.type == "meta" else device
    ids = torch.arange(length, device=where)[None] % model.config.get_text_config().vocab_size
    return ids.expand(len(tables), -1) if isinstance(tables, nn.ModuleList) else ids


def _is_helper(found: Found) -> bool:
    return _helper_part(found.down) is not None


def _helper_part(name: str) -> str | None:
    """First part of a path that names a helper; of what stands before the layers, only whole modules count."""
    layer = layer_path(name) or ""
    inside = name.removeprefix(layer).split(".")[:-1]
    before = [part for part in layer.split(".") if part == "patcher"]
    return next((part for part in (*before, *inside) if HELPERS.fullmatch(part)), None)


def _unlike(model: nn.Module, ffns: Iterable[Found], found: set[str], seen: Probed) -> dict[str, str]:
    """What is built or named like the down projection of an FFN, but cannot be cut; ``found`` are those that can."""
    wanted = {_in_any_layer(f.down) for f in ffns}
    reasons = {name: why for name, why in seen.misses.items() if _helper_part(name) is None}
    for name, module in model.named_modules():
        if is_projection(module) and name not in found and name not in reasons and _in_any_layer(name) in wanted:
            reasons[name] = (
                "it is named like the down projection of other layers, but its channels are not independent of each "
                "other"
                if name in seen.ran
                else "it is named like the down projection of other layers, but takes no part in reading a text"
            )
    return reasons


def _in_any_layer(name: str) -> tuple[str, str]:
    """List of layers that a module is in, and its path inside the layer."""
    layer = layer_path(name) or ""
    return layer.rpartition(".")[0], name.removeprefix(layer)


def _retrieval(model: nn.Module) -> dict[str, str]:
    """Experts that are looked up in tables, beside which an ordinary FFN may stand."""
    return {
        f"{path}.{names[-1]}": why
        for names, why in RETRIEVAL.items()
        for path, module in model.named_modules()
        if layer_path(path) is not None and all(isinstance(getattr(module, n, None), nn.Embedding) for n in names)
    }


def _is_within(name: str, paths: Iterable[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _in_model_order(model: nn.Module, sites: Iterable[FFNSite]) -> list[FFNSite]:
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(sites, key=lambda s: order[s.path if s.stacked else s.projections[-1]])


def _any_number(text: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", text)


def _site(model: nn.Module, found: Found, activation: str) -> FFNSite:
    names = [n for n in (found.gate, found.up, found.down, found.norm, *found.adapters) if n is not None]
    parents = [n.split(".")[:-1] for n in names]
    shortest = min(len(p) for p in parents)
    cut = next((i for i in range(shortest) if len({p[i] for p in parents}) > 1), shortest)
    relative = [None if n is None else ".".join(n.split(".")[cut:]) for n in (found.gate, found.up, found.down)]
    down = model.get_submodule(found.down)
    inside = f"{'.'.join(parents[0][:cut])}."
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
        norm=None if found.norm is None else found.norm.removeprefix(inside),
        adapters=tuple(name.removeprefix(inside) for name in found.adapters),
        runs=found.runs,
    )


def _activation(text_config: Any) -> str:
    for name in ("hidden_act", "hidden_activation", "activation_function", "activation"):
        value = getattr(text_config, name, None)
        if isinstance(value, str):
            return value
    return "unknown"
