"""A checkpoint whose writing was interrupted goes on after its last intact block, and is that of an unbroken call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ffnscope
from ffnscope.apply import sequential
from ffnscope.apply.block_writer import BlockWriter
from ffnscope.apply.write_pruned import Destination, reconstruct_to, write_pruned
from ffnscope.errors import ArtifactError
from ffnscope.ffn.sites import find_sites
from ffnscope.types import PruningPlan
from reference import text
from streams import streamed
from tiny import tiny
from tiny_moe import tiny_moe

N_BLOCKS = 4
pytestmark = pytest.mark.filterwarnings("ignore:.*fitted on fewer tokens", "ignore:experts of one layer")


def a_model() -> Any:
    return tiny("llama", dtype=torch.float64, num_hidden_layers=N_BLOCKS)


def a_plan(model: Any, seed: int = 0) -> PruningPlan:
    random = torch.Generator().manual_seed(seed)
    values = {site: torch.rand(site.d_ff, generator=random, dtype=torch.float64) for site in find_sites(model)}
    return ffnscope.build_plan(ffnscope.Scores("random", values, {}), 0.5, "global")


def files(folder: Path) -> dict[str, Any]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[str]]:
    """Count what is written, and interrupt before the n-th."""

    def start(stop_at: int | None = None) -> list[str]:
        done: list[str] = []

        def save(self: Any, names: Any) -> Any:
            if len(done) == stop_at:
                raise KeyboardInterrupt
            done.append(names[0])
            return real(self, names)

        monkeypatch.setattr(BlockWriter, "_save", save)
        return done

    real = BlockWriter._save
    return start


def test_written_blocks_are_not_written_again(tmp_path: Path, saves: Any) -> None:
    model = streamed(a_model())
    plan, out = a_plan(model), Destination(tmp_path / "out", checkpoint=tmp_path / "part")
    write_pruned(model, None, Destination(tmp_path / "unbroken" / "out"), plan)
    saves(2)
    with pytest.raises(KeyboardInterrupt):
        write_pruned(model, None, out, plan)
    assert not out.path.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["part", "unbroken"]
    done = saves()
    numbers = write_pruned(model, None, out, plan)
    assert [name.split(".")[2] for name in done[:-1]] == ["2", "3"]
    assert len(done) == 3  # and what is outside the blocks
    assert files(out.path) == files(tmp_path / "unbroken" / "out")
    assert numbers[0] == sum(p.numel() for p in ffnscope.prune_(a_model(), plan).parameters())
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize("stop_at", [1, 3, N_BLOCKS])
def test_a_reconstruction_goes_on(stop_at: int, tmp_path: Path, saves: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(a_model())
    plan, windows = a_plan(model), text(16)
    out = Destination(tmp_path / "out", checkpoint=tmp_path / "part")
    wanted = reconstruct_to(model, None, Destination(tmp_path / "unbroken" / "out"), windows, plan)
    saves(stop_at)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_to(model, None, out, windows, plan)
    fitted: list[Tensor] = []
    fit = sequential.fit_columns
    monkeypatch.setattr(sequential, "fit_columns", lambda *given: fitted.append(given[0]) or fit(*given))
    done = saves()
    found = reconstruct_to(model, None, out, windows, plan)
    # the columns of the block that was being written are there already
    assert (len(fitted), len(done)) == (max(0, N_BLOCKS - stop_at - 1), N_BLOCKS - stop_at + 1)
    assert files(out.path) == files(tmp_path / "unbroken" / "out")
    assert found.provenance == wanted.provenance
    assert not (tmp_path / "part").exists()


def test_experts_without_tokens_keep_their_channels(tmp_path: Path, saves: Any) -> None:
    model = streamed(tiny_moe("mixtral"))
    plan, out = a_plan(model), Destination(tmp_path / "out", checkpoint=tmp_path / "part")
    reconstruct_to(model, None, Destination(tmp_path / "unbroken" / "out"), text(8), plan)
    saves(1)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_to(model, None, out, text(8), plan)
    saves()
    reconstruct_to(model, None, out, text(8), plan)
    assert files(out.path) == files(tmp_path / "unbroken" / "out")


def test_a_damaged_shard_is_told_and_written_again(tmp_path: Path, saves: Any) -> None:
    model = streamed(a_model())
    plan, out = a_plan(model), Destination(tmp_path / "out", checkpoint=tmp_path / "part")
    write_pruned(model, None, Destination(tmp_path / "unbroken" / "out"), plan)
    saves(3)
    with pytest.raises(KeyboardInterrupt):
        write_pruned(model, None, out, plan)
    shard = tmp_path / "part" / "1.written"
    changed = bytearray(shard.read_bytes())
    changed[-5] ^= 4
    shard.write_bytes(changed)
    done = saves()
    with pytest.warns(UserWarning, match="is not what was written there; model.layers.1 is written again"):
        write_pruned(model, None, out, plan)
    assert [name.split(".")[2] for name in done[:-1]] == ["1", "3"]
    assert files(out.path) == files(tmp_path / "unbroken" / "out")


def test_a_damaged_state_is_told(tmp_path: Path, saves: Any) -> None:
    model = streamed(a_model())
    plan, out = a_plan(model), Destination(tmp_path / "out", checkpoint=tmp_path / "part")
    saves(2)
    with pytest.raises(KeyboardInterrupt):
        write_pruned(model, None, out, plan)
    state = tmp_path / "part" / "blocks.json"
    state.write_text(state.read_text().replace("0.written", "1.written"))
    with pytest.raises(ArtifactError, match="Delete it, and all blocks are written again"):
        write_pruned(model, None, out, plan)


@pytest.mark.parametrize("change", ["plan", "model", "padding"])
def test_what_was_written_for_something_else_is_not_used(change: str, tmp_path: Path, saves: Any) -> None:
    first = a_model()
    second = tiny("llama", dtype=torch.float64, num_hidden_layers=N_BLOCKS, seed=1) if change == "model" else first
    plan = a_plan(first)
    other = a_plan(first, seed=1) if change == "plan" else plan
    saves(3)
    with pytest.raises(KeyboardInterrupt):
        write_pruned(streamed(first), None, Destination(tmp_path / "out", checkpoint=tmp_path / "part"), plan)
    done = saves()
    pad = change == "padding"
    out = Destination(tmp_path / "out", pad_to_widest=pad, checkpoint=tmp_path / "part")
    write_pruned(streamed(second), None, out, other)
    assert len(done) == N_BLOCKS + 1
    write_pruned(streamed(second), None, Destination(tmp_path / "wanted" / "out", pad_to_widest=pad), other)
    assert files(out.path) == files(tmp_path / "wanted" / "out")
