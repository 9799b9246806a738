"""Times of parts, by hand where the machine's probes take a second each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ffnscope.ffn.sites import find_sites
from ffnscope.run import RunConfig, seconds
from ffnscope.run.estimate import estimate
from ffnscope.run.seconds import EFFICIENCY, seconds_per_token, solve_seconds, sums_seconds
from runs import quiet_run
from tiny import D_FF, HIDDEN, LAYERS, tiny
from tiny_moe import tiny_moe


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every probe takes a second."""
    monkeypatch.setattr(seconds, "_least", lambda work: 1.0)


def solve(n: int, d: int, k: int, times: int) -> float:
    """FLOP of the least squares of one FFN."""
    missing, errors = 2 * d * (n - k) * k, 2 * d * (n - k) ** 2 + 2 * d * k**2
    return times * (k**3 / 3 + 2 * d * k**2 + 2 * d * k**2) + missing * (3 if times > 1 else 1) + errors


@pytest.mark.usefixtures("one_second")
def test_least_squares() -> None:
    model = tiny("llama")
    sites = find_sites(model)
    speed = 2 * 512**3 * EFFICIENCY  # of float64
    k = D_FF // 2
    assert solve_seconds(model, sites, 0.5) == pytest.approx(LAYERS * solve(D_FF, HIDDEN, k, 5) / speed)
    once = solve_seconds(model, sites, 0.5, chooses=False)
    assert once == pytest.approx(LAYERS * solve(D_FF, HIDDEN, k, 1) / speed)


@pytest.mark.usefixtures("one_second")
def test_sums_over_tokens() -> None:
    model = tiny("llama")
    sites = find_sites(model)
    flop = 10 * LAYERS * 2 * (D_FF + HIDDEN) * D_FF
    speed = 2 * 1024 * HIDDEN * D_FF * EFFICIENCY  # of the model's dtype
    per_token = seconds_per_token(model, sites)
    assert sums_seconds(model, sites, 10, per_token) == pytest.approx(flop / speed)


@pytest.mark.usefixtures("one_second")
def test_experts_share_the_tokens() -> None:
    model = tiny_moe("mixtral")
    sites = find_sites(model)
    experts = sum(s.layer == sites[0].layer for s in sites)
    alone = sums_seconds(model, sites[:1], 10, 1.0)
    assert experts > 1
    assert sums_seconds(model, sites[:experts], 10, 1.0) == pytest.approx(alone)


@pytest.mark.usefixtures("one_second")
def test_a_reconstruction_tells_its_least_squares(small: Callable[..., RunConfig]) -> None:
    def told(**pruning: Any) -> float:
        asked = {"ratios": [0.5], "algorithms": ["random"], **pruning}
        (line,) = [one for one in estimate(small(pruning=asked)).lines if one.stage == "reconstruct"]
        return line.seconds or 0

    model = tiny("llama", vocab_size=300)
    sites = find_sites(model)
    per_token = seconds_per_token(model, sites)
    forward = 2 * 6 * 32 * per_token + sums_seconds(model, sites, 6 * 32, per_token)
    assert told(reconstruct="sequential") == pytest.approx(forward + solve_seconds(model, sites, 0.5), rel=0.05)
    assert told(reconstruct="one_shot") == pytest.approx(solve_seconds(model, sites, 0.5, chooses=False))


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
