"""Times of parts, by hand where the machine's probes take a second each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ffnscope.run import RunConfig, seconds
from ffnscope.run.estimate import estimate
from runs import quiet_run
from tiny import tiny


def test_samples_of_a_streamed_model_are_generated_only_where_asked_for(
    small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    def stages(**changes: Any) -> dict[str, int]:
        return {line.stage: line.reads for line in estimate(small(**changes)).lines}

    asked = {"samples": {"enabled": True, "max_new_tokens": 7}}
    assert "samples" in stages() and "samples" not in stages(model={"stream": "cpu"})
    n_models = 5  # a reading of all weights per model and token, for all prompts together
    assert stages(model={"stream": "cpu"}, evaluation=asked)["samples"] == n_models * 7
    assert "samples" not in stages(evaluation={"samples": {"enabled": False}})
    pruning = {"ratios": [0.5], "algorithms": ["random"]}
    for enabled in (None, True):
        name = tmp_path / str(enabled)
        config = small(
            model={"stream": "cpu"},
            pruning=pruning,
            evaluation={"samples": {"enabled": enabled}},
            output={"dir": str(name)},
        )
        found = quiet_run(config)
        assert bool(found.samples) is (name / "samples.json").exists() is bool(enabled)


def test_checkpoints_tell_their_time(small: Callable[..., RunConfig]) -> None:
    def told(**model: Any) -> float:
        found = estimate(small(output={"checkpoints": True}, model=model))
        (line,) = [one for one in found.lines if one.stage == "checkpoints"]
        assert found.bounds.work.reloads is ("device_map" not in model)
        return line.seconds or 0

    n_bytes = 4 * sum(p.numel() for p in tiny("llama", vocab_size=300).parameters())
    assert told() == pytest.approx(4 * n_bytes * seconds.SAVE_SECONDS, rel=0.2)
    assert told(device_map="cpu") == told()


def test_the_least_of_five() -> None:
    runs: list[int] = []
    assert seconds._least(lambda: runs.append(torch.ones(1).numel())) >= 0
    assert len(runs) == 5
