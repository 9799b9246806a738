"""Helpers for tests of reconstructions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffnscope.apply.one_shot import reconstruct
from ffnscope.apply.reconstruction import Reconstruction
from ffnscope.calibrate.collect import collect
from ffnscope.calibrate.taps import SignalTap, channel_taps
from ffnscope.ffn.sites import find_sites
from ffnscope.types import ChannelStats, FFNSite, PruningPlan
from reference import text
from tiny import ARCHITECTURES, logits, tiny
from tiny_listed import tiny_listed
from tiny_moe import tiny_moe, up_first

MakePlan = Callable[..., PruningPlan]
WINDOWS = text(32)
EXACT, VISIBLE = 1e-4, 1e-2


def make(name: str, **changes: Any) -> Any:
    """A tiny model of any kind by name."""
    if name == "listed":
        return tiny_listed()
    if name == "up_first":
        return up_first(tiny_moe("mixtral"))
    return (tiny if name in ARCHITECTURES else tiny_moe)(name, **changes)


def stats_of(model: Any, *names: str) -> dict[FFNSite, ChannelStats]:
    """Statistics of the calibration text."""
    return collect(model, WINDOWS, names or ("h_outer",))


def refit(model: Any, random_plan: MakePlan, sparsity: float = 0.5, **options: Any) -> Reconstruction:
    """A refit of a random plan."""
    return reconstruct(model, random_plan(model, sparsity), stats_of(model), **options)


def state(model: Any) -> dict[str, Tensor]:
    """A copy of every weight."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: Any, before: dict[str, Tensor]) -> bool:
    """Whether the weights are bit-identical."""
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


def distance(first: Tensor, second: Tensor) -> float:
    """Largest difference."""
    return float((first.double() - second.double()).abs().max())


def outputs(model: Any) -> dict[FFNSite, Tensor]:
    """y of every FFN on the calibration tokens, [n, d_model]; of an expert on its own tokens."""
    found: dict[FFNSite, list[Tensor]] = {}
    tap = SignalTap(lambda site, _, value: found.setdefault(site, []).append(value.flatten(0, -2).clone()), ("y",))
    with torch.no_grad(), channel_taps(model, find_sites(model), None, signal_tap=tap):
        logits(model, WINDOWS.input_ids)
    return {site: torch.cat(parts) for site, parts in found.items()}


def reloaded(path: Path, **options: Any) -> Any:
    """What stock `transformers` makes of a checkpoint."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **options).eval()
