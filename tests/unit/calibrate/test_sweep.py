"""A streamed pass gives the statistics of the resident one, and holds one block at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffnscope.calibrate.collect import PassOptions, calibrate
from ffnscope.errors import NonFiniteError, NotAvailableError
from ffnscope.ffn.sites import find_sites
from ffnscope.ffn.streamed import Place, is_streamed, stream_
from ffnscope.registry import METRICS
from ffnscope.types import ChannelStats, FFNSite
from offload import in_memory
from reference import calibrate_in_two, exact, padded, some_core, text
from tiny import ARCHITECTURES, tiny
from tiny_moe import MIXTURES, tiny_moe


def streamed(model: Any, place: Place = "device", folder: Path | None = None) -> Any:
    """The same weights, all offloaded to memory, in a model that runs block by block."""
    import copy

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


SPLITS: dict[str, dict[str, Any]] = {
    "all windows backward": {},
    "some windows backward": {"gradient_windows": 3},
    "cut windows backward": {"gradient_windows": 3, "gradient_length": 8},
}
CHANNELS = [name for name in METRICS.names() if METRICS.get(name).scope == "site"]


@pytest.mark.parametrize("split", SPLITS)
def test_every_statistic_of_every_metric_in_float64(split: str) -> None:
    model = exact("llama")
    core = some_core(find_sites(model))
    windows = padded([16, 9, 16, 12, 16, 5, 16])
    wanted = calibrate_in_two(model, windows, core, batch_size=2, **SPLITS[split])
    found = calibrate_in_two(streamed(model), windows, core, batch_size=2, **SPLITS[split])
    assert any(site.role == "unembedding" for site in found)
    assert distance(found, wanted) <= 1e-9


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architectures(arch: str) -> None:
    model = tiny(arch)
    wanted = calibrate(model, text(5), CHANNELS, options=PassOptions(batch_size=2))
    found = calibrate(streamed(model), text(5), CHANNELS, options=PassOptions(batch_size=2))
    assert distance(found, wanted) <= 1e-5


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts(name: str) -> None:
    model = tiny_moe(name)
    wanted = calibrate(model, text(5), CHANNELS, options=PassOptions(batch_size=2))
    found = calibrate(streamed(model), text(5), CHANNELS, options=PassOptions(batch_size=2))
    assert distance(found, wanted) <= 1e-5
