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
from ffnscope.ffn.streamed import Place
from ffnscope.registry import METRICS
from reference import calibrate_in_two, exact, padded, some_core, text
from streams import distance, streamed
from tiny import ARCHITECTURES, tiny
from tiny_moe import MIXTURES, tiny_moe

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


# accelerate cannot offload them: code outside of a module reads its weights
NOT_OFFLOADED = ("llama4_text", "longcat_flash", "dbrx", "jetmoe")


@pytest.mark.parametrize("name", [name for name in MIXTURES if name not in NOT_OFFLOADED])
def test_mixtures_of_experts(name: str) -> None:
    model = tiny_moe(name)
    wanted = calibrate(model, text(5), CHANNELS, options=PassOptions(batch_size=2))
    found = calibrate(streamed(model), text(5), CHANNELS, options=PassOptions(batch_size=2))
    assert distance(found, wanted) <= 1e-5


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_hidden_states_wait_elsewhere_and_leave_nothing(place: Place, tmp_path: Path) -> None:
    model = exact("llama", num_hidden_layers=3)
    wanted = calibrate(model, text(5), CHANNELS, options=PassOptions(batch_size=2))
    found = calibrate(streamed(model, place, tmp_path), text(5), CHANNELS, options=PassOptions(batch_size=2))
    assert distance(found, wanted) <= 1e-9
    assert list(tmp_path.iterdir()) == []


def test_some_sites_only() -> None:
    model = exact("llama", num_hidden_layers=4)
    sites = find_sites(model)[1:3]
    wanted = calibrate(model, text(5), CHANNELS, sites=sites, options=PassOptions(batch_size=2))
    found = calibrate(streamed(model), text(5), CHANNELS, sites=sites, options=PassOptions(batch_size=2))
    assert distance(found, wanted) <= 1e-9


def test_one_block_is_in_memory_at_a_time_and_is_read_a_bounded_number_of_times() -> None:
    model = streamed(tiny("llama", num_hidden_layers=4))
    layers = model.model.layers
    here: list[int] = []
    most: list[int] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        whole = [i for i, layer in enumerate(layers) if all(p.device.type != "meta" for p in layer.parameters())]
        most.append(len(whole))
        here.extend(whole)

    for layer in layers:
        layer.mlp.down_proj.register_forward_pre_hook(look)
    calibrate(model, text(8), ["wanda", "scar_loss_proxy"], sites=find_sites(model), options=PassOptions(batch_size=1))
    assert max(most) == 1
    assert all(p.device.type == "meta" for p in model.parameters())
    assert set(here) == {0, 1, 2, 3}


def test_no_graph_spans_two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(tiny("llama", num_hidden_layers=3))
    grads: list[tuple[Tensor | None, bool]] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0]
        grads.append((hidden.grad_fn, hidden.requires_grad))

    sites = find_sites(model)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(look, with_kwargs=True)
    calibrate(model, text(2), ["scar_loss_proxy"], sites=sites)
    assert all(graph is None for graph, _ in grads)
    assert sum(needs for _, needs in grads) == 2  # all blocks but the first, which has a site


def test_an_overflow_is_named() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("inf")
    with pytest.raises(NonFiniteError, match=r"model.layers.1.mlp is NaN or infinite|model.layers.1"):
        calibrate(streamed(model), text(2), ["wanda"], sites=find_sites(tiny("llama")))


def test_refused_by_name() -> None:
    with pytest.raises(NotAvailableError, match=r"joins signals of two layers.*without stream"):
        from ffnscope.calibrate.collect import collect
        from ffnscope.registry import STATISTICS

        name = next(n for n in STATISTICS.names() if STATISTICS.get(n).reads_next)
        model = streamed(tiny("llama"))
        collect(model, text(2), [name], core=some_core(find_sites(model)))
