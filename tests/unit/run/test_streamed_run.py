"""A run on a streamed model gives the plans, results and checkpoints of one on a resident model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ffnscope
from faults import stop_at
from ffnscope.apply import sequential
from ffnscope.apply.block_writer import BlockWriter
from ffnscope.calibrate import states
from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.errors import ConfigError, UsageError
from ffnscope.ffn.load import ModelSource
from ffnscope.ffn.own_folder import OwnFolder
from ffnscope.io import read_plan, read_scores
from ffnscope.run import RunConfig, steps
from runs import quiet_run, results


@pytest.mark.filterwarnings("ignore:.*fitted on fewer tokens")
@pytest.mark.parametrize("reconstruct", ["none", "sequential"])
def test_a_run_block_by_block(reconstruct: str, small: Callable[..., RunConfig], tmp_path: Path) -> None:
    def one(name: str, **model: Any) -> Path:
        output = {"dir": str(tmp_path / name), "checkpoints": True}
        pruning = {"ratios": [0.5], "algorithms": ["scar_loss_proxy"], "reconstruct": reconstruct}
        quiet_run(small(model=model, output=output, pruning=pruning))
        return tmp_path / name

    wanted, found = one("resident"), one("streamed", stream="disk")
    scores = [read_scores(folder / "scores.safetensors")[0]["scar_loss_proxy"].values for folder in (wanted, found)]
    for site, value in scores[0].items():
        assert torch.allclose(scores[1][site], value, rtol=1e-5, atol=1e-12)
    (name,) = (path.name for path in (wanted / "plans").glob("*.json"))
    plans = [read_plan(folder / "plans" / name) for folder in (wanted, found)]
    assert all(torch.equal(plans[1].kept[site], index) for site, index in plans[0].kept.items())
    values = [_perplexities(folder / "checkpoints") for folder in (wanted, found)]
    assert values[1] == pytest.approx(values[0], rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*fitted on fewer tokens")
def test_nothing_that_a_block_has_given_is_made_again(
    small: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str) -> RunConfig:
        output = {"dir": str(tmp_path / name), "checkpoints": True}
        pruning = {"ratios": [0.5], "algorithms": ["wanda"], "reconstruct": "sequential"}
        return small(model={"stream": "disk"}, output=output, pruning=pruning)

    quiet_run(config("unbroken"))
    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        stop_at(once, steps, "write_reconstruction", 1)
        quiet_run(config("broken"))
    fitted = stop_at(monkeypatch, sequential, "fit_columns", -1)
    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        stop_at(once, BlockWriter, "_save", 2)
        quiet_run(config("broken"))
    assert fitted == []
    folder = tmp_path / "broken" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["wanda-0.5.part"]
    saved = stop_at(monkeypatch, BlockWriter, "_save", -1)
    quiet_run(config("broken"))
    assert len(saved) == 2  # one of two blocks, and what is outside them
    assert results(tmp_path / "broken") == results(tmp_path / "unbroken")


def _perplexities(folder: Path) -> list[float]:
    windows = contiguous_windows(torch.arange(3, 35)[None].repeat(2, 1), "counting")
    models = [ffnscope.load_model(ModelSource(str(path), device="cpu")).model for path in sorted(folder.iterdir())]
    return [ffnscope.perplexity(model, windows).value for model in models]


def test_what_contradicts_it_is_refused(small: Callable[..., RunConfig]) -> None:
    with pytest.raises(UsageError, match="leaves all weights in their files"):
        ModelSource("x", stream="cpu", device_map="auto")
    with pytest.raises(UsageError, match="device, cpu, disk"):
        ModelSource("x", stream="tape")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"would do nothing beside model\.stream"):
        small(model={"stream": "cpu", "device_map": "auto"})


@pytest.mark.filterwarnings("ignore:.*fitted on fewer tokens")
def test_hidden_states_wait_in_the_folder_of_the_run(
    small: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents: set[Path | None] = set()

    class Seen(OwnFolder):
        def __init__(self, parent: Path | None, name: str):
            parents.add(parent)
            super().__init__(parent, name)

    monkeypatch.setattr(states, "OwnFolder", Seen)
    pruning = {"ratios": [0.5], "algorithms": ["random"], "reconstruct": "sequential"}
    config = small(model={"stream": "disk"}, pruning=pruning)
    left = config.output_dir / f".ffnscope-states.{'0' * 32}.tmp"
    quiet_run(config)
    assert parents == {config.output_dir}
    left.mkdir()  # by a process that was killed
    quiet_run(config)
    assert not list(config.output_dir.glob(".*"))
    given = tmp_path / "given"
    other = {"dir": str(tmp_path / "other")}
    quiet_run(small(model={"stream": "disk", "offload_folder": str(given)}, pruning=pruning, output=other))
    assert parents == {config.output_dir, given} and not list(given.iterdir())
