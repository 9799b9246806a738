"""A streamed pass that was cut off goes on behind the last block that it has saved."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ffnscope.calibrate.collect import PassOptions, calibrate
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import ArtifactError
from ffnscope.ffn.sites import find_sites
from ffnscope.ffn.streamed import Place
from ffnscope.types import ChannelStats, FFNSite
from reference import exact, padded
from streams import distance, streamed

METRICS = ["wanda", "activation_outlier_index", "scar_loss_proxy"]
LAYERS, BATCHES, BACKWARD = 4, 4, 2
FORWARD_RUNS, BACKWARD_RUNS = LAYERS * BATCHES, LAYERS * BACKWARD
WINDOWS = padded([16, 9, 16, 12, 16, 5, 16])


class Cut(Exception):
    """An interruption in the middle of a pass."""


def cut_at(run: int) -> Callable[[int, int], None]:
    left = [run]

    def on_batch(done: int, total: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Cut

    return on_batch


def options(path: Path | None, **changes: Any) -> PassOptions:
    return PassOptions(**{"batch_size": 2, "gradient_windows": 3, "checkpoint": path, **changes})


def run(model: nn.Module, path: Path | None, cut: int | None = None, windows: Windows = WINDOWS, **changes: Any) -> Any:
    on_batch = None if cut is None else cut_at(cut)
    return calibrate(model, windows, METRICS, options=options(path, **changes), on_batch=on_batch)


def equal(found: dict[FFNSite, ChannelStats], wanted: dict[FFNSite, ChannelStats]) -> bool:
    return list(found) == list(wanted) and all(
        found[site].counts == one.counts and all(torch.equal(v, found[site].values[n]) for n, v in one.values.items())
        for site, one in wanted.items()
    )


def counted(model: Any) -> list[int]:
    """Counts the runs of each layer on whole windows."""
    runs = [0] * LAYERS
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda m, args, out, i=i: runs.__setitem__(i, runs[i] + 1))
    return runs


@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
@pytest.mark.parametrize("seed", range(2))
def test_interrupts_at_random_blocks_change_no_bit(place: Place, seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"{place} {seed}")
    model = exact("llama", num_hidden_layers=LAYERS)
    wanted = run(streamed(model), None)
    path = tmp_path / "stats.safetensors"
    first = draw.randrange(1, FORWARD_RUNS)
    with pytest.raises(Cut):  # forward
        run(streamed(model, place, tmp_path / "states"), path, first)
    rest = FORWARD_RUNS - first // BATCHES * BATCHES
    with pytest.raises(Cut):  # backward
        run(streamed(model, place, tmp_path / "states"), path, rest + draw.randrange(BACKWARD_RUNS))
    assert equal(run(streamed(model, place, tmp_path / "states"), path), wanted)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_finished_blocks_are_not_run_again(tmp_path: Path) -> None:
    model, path = exact("llama", num_hidden_layers=LAYERS), tmp_path / "stats.safetensors"
    sites = find_sites(model)

    def runs(cut: int | None) -> list[int]:
        twin = streamed(model)
        found = counted(twin)
        on_batch = None if cut is None else cut_at(cut)
        calibrate(twin, WINDOWS, ["wanda"], sites=sites, options=options(path), on_batch=on_batch)
        return found

    whole = runs(None)
    with pytest.raises(Cut):
        runs(2 * BATCHES + 1)
    again = runs(None)
    assert [a - b for a, b in zip(whole, again, strict=True)] == [BATCHES, BATCHES, 0, 0]


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_what_waits_on_disk_is_bounded(place: Place, tmp_path: Path) -> None:
    model, path = exact("llama", num_hidden_layers=LAYERS), tmp_path / "stats.safetensors"
    with pytest.raises(Cut):  # within the last block of the way back
        run(streamed(model, place, tmp_path / "states"), path, FORWARD_RUNS + BACKWARD_RUNS - 1)
    names = {p.name for p in path.with_suffix(".sweep").iterdir()}
    waiting = {f"state_{block}_{i}.safetensors" for block in (0, -2) for i in range(BACKWARD)}
    assert {name for name in names if name.startswith("state")} == waiting
    assert sum(name.startswith("sums") for name in names) == LAYERS


def test_another_text_does_not_go_on(tmp_path: Path) -> None:
    model, path = exact("llama", num_hidden_layers=LAYERS), tmp_path / "stats.safetensors"
    other = padded([16, 16, 16, 12, 16, 5, 16], seed=1)
    with pytest.raises(Cut):
        run(streamed(model), path, FORWARD_RUNS + 1)
    assert equal(run(streamed(model), path, windows=other), run(streamed(model), None, windows=other))
    assert list(tmp_path.iterdir()) == []


def test_a_resident_pass_removes_them(tmp_path: Path) -> None:
    model, path = exact("llama", num_hidden_layers=LAYERS), tmp_path / "stats.safetensors"
    with pytest.raises(Cut):
        run(streamed(model), path, FORWARD_RUNS)
    run(model, path)
    assert list(tmp_path.iterdir()) == []


def test_a_resident_pass_in_between_is_gone_on_from(tmp_path: Path) -> None:
    model, path = exact("llama", num_hidden_layers=LAYERS), tmp_path / "stats.safetensors"
    wanted = run(model, None)
    with pytest.raises(Cut):
        run(streamed(model), path, FORWARD_RUNS + 1)
    with pytest.raises(Cut):
        run(model, path, 2, checkpoint_every=1)
    assert distance(run(streamed(model), path), wanted) <= 1e-12  # the files of the first one are of other steps
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pattern", ["sums_forward_1*", "state_2_0*", "position.json"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_flipped_bit_is_told_and_without_the_file_the_pass_starts_anew(
    pattern: str, place: Place, tmp_path: Path
) -> None:
    model, path = exact("llama", num_hidden_layers=LAYERS), tmp_path / "stats.safetensors"
    with pytest.raises(Cut):
        run(streamed(model, place, tmp_path / "states"), path, 2 * BATCHES)
    (damaged,) = path.with_suffix(".sweep").glob(pattern)
    content = bytearray(damaged.read_bytes())
    content[-9] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{re.escape(damaged.name)}.*Delete it, and the pass starts anew"):
        run(streamed(model, place, tmp_path / "states"), path)
    damaged.unlink()
    assert equal(run(streamed(model, place, tmp_path / "states"), path), run(streamed(model), None))


def test_a_file_of_somebody_else_stays(tmp_path: Path) -> None:
    model, path = exact("llama", num_hidden_layers=LAYERS), tmp_path / "stats.safetensors"
    with pytest.raises(Cut):
        run(streamed(model), path, BATCHES)
    mine = path.with_suffix(".sweep") / "notes.txt"
    mine.write_text("mine")
    run(streamed(model), path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [mine]
