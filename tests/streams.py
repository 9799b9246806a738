"""Streamed twins of tiny models, and how far their statistics are apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from ffnscope.ffn.streamed import Place, stream_
from ffnscope.types import ChannelStats, FFNSite


def streamed(model: Any, place: Place = "device", folder: Path | None = None) -> Any:
    """The same weights, all offloaded to memory, in a model that runs block by block."""
    from accelerate import cpu_offload

    twin = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert all(p.device.type == "meta" for p in twin.parameters())
    return stream_(twin, place, torch.device("cpu"), folder)


def distance(found: dict[FFNSite, ChannelStats], wanted: dict[FFNSite, ChannelStats]) -> float:
    """Largest difference of any statistic, as a share of its largest value; counts and names must agree."""
    assert list(found) == list(wanted)
    worst = 0.0
    for site, stats in wanted.items():
        assert found[site].counts == stats.counts
        assert found[site].reductions == stats.reductions
        for name, value in stats.values.items():
            scale = float(value.double().abs().max()) or 1.0
            worst = max(worst, float((found[site].values[name].double() - value.double()).abs().max()) / scale)
    return worst
