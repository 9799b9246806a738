"""A dense model and its pruned form: are they a pair, and was removed exactly what the plan says?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ffnscope.errors import UsageError
from ffnscope.evaluate.costs import channel_parameters, ffn_parameters
from ffnscope.evaluate.expert_costs import unused_parameters
from ffnscope.ffn.load import LoadedModel
from ffnscope.ffn.projection import modules_of, weights_of
from ffnscope.types import FFNSite, PruningPlan


@dataclass(frozen=True, slots=True)
class Removed:
    """FFN parameters that the pruned model lacks.

    Attributes:
        dense: FFN parameters of the dense model.
        found: how many fewer the pruned model has.
        planned: how many the plan removes, None without a plan. Equal to ``found``, unless ``padded``.
        padded: some FFNs are wider than the plan says, and their surplus channels are zero (padding to the widest,
            experts of one layer, kinds of FFN that share a config field).
    """

    dense: int
    found: int
    planned: int | None
    padded: bool = False

    @property
    def share(self) -> float:
        """Fraction of the dense model's FFN parameters that is gone."""
        return self.found / self.dense


def check_alike(dense: LoadedModel, pruned: LoadedModel) -> None:
    """Raise UsageError unless both models are of one family, vocabulary, device, dtype and attention implementation."""
    for what, cure, first, second in _traits(dense, pruned):
        if first != second:
            raise UsageError(
                f"the two models differ in more than FFN width: {what} is {first!r} in {dense.source.model_id} and "
                f"{second!r} in {pruned.source.model_id}. {cure}"
            )
    if _vocabulary(dense.tokenizer) != _vocabulary(pruned.tokenizer):
        raise UsageError(
            f"the tokenizers of {dense.source.model_id} and {pruned.source.model_id} map tokens to different ids. "
            f"{_NO_PAIR}"
        )


def removed_parameters(
    dense: nn.Module,
    dense_sites: Sequence[FFNSite],
    pruned: nn.Module,
    pruned_sites: Sequence[FFNSite],
    plan: PruningPlan | None = None,
) -> Removed:
    """Count what pruning removed, and compare it with the plan: every width, and every parameter of the model.

    Raises:
        UsageError: the models differ outside their FFNs, an FFN of the pruned model is wider, or what is missing is
            not what the plan removes.
    """
    _check_rest(dense, dense_sites, pruned, pruned_sites)
    found = sum(ffn_parameters(dense, s) for s in dense_sites) - sum(ffn_parameters(pruned, s) for s in pruned_sites)
    total = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in pruned.parameters())
    total -= unused_parameters(dense, dense_sites) - unused_parameters(pruned, pruned_sites)
    if total != found:
        raise UsageError(
            f"the pruned model has {total:,} parameters fewer, but its FFNs {found:,}: they differ in something else. "
            f"{_NO_PAIR}"
        )
    every = sum(ffn_parameters(dense, s) for s in dense_sites)
    if plan is None:
        return Removed(every, found, None)
    planned, widths = _planned(dense, dense_sites, plan)
    wrong = next((s for s in pruned_sites if not _is_as_planned(pruned, s, widths[s.name])), None)
    if wrong is not None:
        raise UsageError(
            f"{wrong.name} has {wrong.d_ff} channels in the pruned model, but the plan leaves {widths[wrong.name]}. "
            "Give the plan that the model was pruned by."
        )
    wider = any(s.d_ff > widths[s.name] for s in pruned_sites)
    if planned != found and not wider:
        raise UsageError(
            f"the plan removes {planned:,} FFN parameters, but the pruned model lacks {found:,}. {_NO_PAIR}"
        )
    return Removed(every, found, planned, wider)


def _is_as_planned(model: nn.Module, site: FFNSite, width: int) -> bool:
    """Whether an FFN has the planned width, or is wider by channels that are nothing but zeros."""
    if site.d_ff <= width:
        return site.d_ff == width
    w = weights_of(model, site)
    rows = [part for part in (w.gate, w.up, w.down.T, w.gate_bias, w.up_bias) if part is not None]
    empty = torch.stack([(part == 0).reshape(site.d_ff, -1).all(1) for part in rows]).all(0)
    return int(empty.sum()) >= site.d_ff - width


_NO_PAIR = "Give a model and its own pruned form."


def _traits(dense: LoadedModel, pruned: LoadedModel) -> list[tuple[str, str, Any, Any]]:
    """What must agree: name, what to do about it, and its value in both models."""
    one, other = dense.model, pruned.model
    load = "Give both the same --dtype and --device."
    return [
        ("model_type", _NO_PAIR, _config(one).model_type, _config(other).model_type),
        ("vocabulary size", _NO_PAIR, _config(one).vocab_size, _config(other).vocab_size),
        ("dtype", load, _of_parameters(one, "dtype"), _of_parameters(other, "dtype")),
        ("device", load, _of_parameters(one, "device"), _of_parameters(other, "device")),
        ("attention implementation", "Load both with the same one.", attention(one), attention(other)),
    ]


def attention(model: Any) -> str:
    """Name of the attention implementation that a model uses, for example "sdpa"."""
    return str(getattr(model.config, "_attn_implementation", "unknown"))


def _config(model: Any) -> Any:
    return model.config.get_text_config()


def _of_parameters(model: nn.Module, name: str) -> str:
    return ", ".join(sorted({str(getattr(p, name)).removeprefix("torch.") for p in model.parameters()}))


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    return tokenizer.get_vocab()


def _check_rest(
    dense: nn.Module, dense_sites: Sequence[FFNSite], pruned: nn.Module, pruned_sites: Sequence[FFNSite]
) -> None:
    """Everything but the FFNs' projections must have the same names and shapes; FFNs may only be narrower."""
    one, other = {s.name: s for s in dense_sites}, {s.name: s for s in pruned_sites}
    shapes = _shapes_outside(dense, dense_sites), _shapes_outside(pruned, pruned_sites)
    if one.keys() != other.keys() or shapes[0] != shapes[1]:
        differing = [n for n in (*shapes[0], *shapes[1]) if shapes[0].get(n) != shapes[1].get(n)]
        name = next(iter([*differing, *(one.keys() ^ other.keys())]))
        raise UsageError(
            f"the two models differ in more than FFN width: {name} is {shapes[0].get(name, 'missing')} in the dense "
            f"model and {shapes[1].get(name, 'missing')} in the pruned one. {_NO_PAIR}"
        )
    wider = next((n for n, s in other.items() if s.d_ff > one[n].d_ff), None)
    if wider is not None:
        raise UsageError(
            f"{wider} has {other[wider].d_ff} channels in the pruned model and {one[wider].d_ff} in the dense one. "
            "Give the dense model first."
        )


def _shapes_outside(model: nn.Module, sites: Sequence[FFNSite]) -> dict[str, tuple[int, ...]]:
    inside = {name for site in sites for name in modules_of(site)}

    def is_inside(name: str) -> bool:
        # projections of experts are parameters, not modules, and so are their biases
        return name.rpartition(".")[0] in inside or name.removesuffix("_bias") in inside

    return {n: tuple(p.shape) for n, p in model.named_parameters() if not is_inside(n)}


def _planned(model: nn.Module, sites: Sequence[FFNSite], plan: PruningPlan) -> tuple[int, dict[str, int]]:
    """Parameters that the plan removes from the dense model, and the width that it leaves at every site."""
    widths = {s.name: s.d_ff for s in sites}
    unknown = next((s for s in plan.kept if widths.get(s.name) != s.d_ff), None)
    if unknown is not None:
        raise UsageError(
            f"the plan was made for {unknown.name} with {unknown.d_ff} channels; the dense model has "
            f"{widths.get(unknown.name, 'no such FFN')} there. Give the plan that the model was pruned by."
        )
    removed = sum((s.d_ff - k.numel()) * channel_parameters(model, s) for s, k in plan.kept.items())
    return removed, {**widths, **{s.name: k.numel() for s, k in plan.kept.items()}}
