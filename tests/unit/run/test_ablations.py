"""Ablations of a run: files, resume, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from ffnscope.errors import ConfigError
from ffnscope.run import RunConfig, RunResult
from ffnscope.run.dry_run import dry_run
from runs import quiet_run, results, strict_json
from tiny import LAYERS

ASKED: dict[str, Any] = {
    "supernode": {"enabled": True, "top_k": 4, "halo_fraction": 0.2},
    "halo": {"enabled": True},
    "ablation": {"enabled": True, "num_samples": 3, "draws": 2, "dose_shares": [0.0, 1.0], "channels": 12, "sites": 2},
}


@pytest.fixture
def result(small: Callable[..., RunConfig]) -> RunResult:
    return quiet_run(small(**ASKED))


def test_sets_doses_and_single_channels(result: RunResult, small: Callable[..., RunConfig]) -> None:
    folder = result.folder / "analysis"
    sets = strict_json(folder / "ablation.json")["rows"]
    kinds = ["core", "write_halo", "core_and_write_halo", "read_halo", "core_and_read_halo"]
    drawn = [name for _ in range(2) for name in ("random", "lp_matched")]
    assert [(r["set"], r["how"]) for r in sets] == [(k, how) for how in ("zero", "mean") for k in (*kinds, *drawn)]
    assert sets[0]["n_channels"] == 4 * LAYERS
    assert all(math.isfinite(r["loss_change"]) and r["stderr"] > 0 and r["n_targets"] == 93 for r in sets)
    doses = strict_json(folder / "dose.json")["rows"]
    assert [(r["core_share"], r["draw"]) for r in doses] == [(s, d) for s in (0.0, 1.0) for d in (0, 1)]
    ranking = strict_json(folder / "ranking_quality.json")
    assert {r["metric"] for r in ranking["rows"]} == {*result.scores, "random", "between halves"}
    assert len(ranking["facts"]["channels"]) == 12
    assert {c["site"] for c in ranking["facts"]["channels"]} == {f"model.layers.{i}.mlp" for i in (0, LAYERS - 1)}
    before = results(result.folder)
    assert quiet_run(small(**ASKED)).scores.keys() == result.scores.keys()
    assert results(result.folder) == before


def test_only_what_changed_runs_again(result: RunResult, small: Callable[..., RunConfig]) -> None:
    stages = strict_json(result.folder / "ledger.json")["stages"]
    other = {**ASKED, "ablation": {**ASKED["ablation"], "channels": 8}}
    quiet_run(small(**other), overwrite=True)
    again = strict_json(result.folder / "ledger.json")["stages"]
    assert stages["calibrate"] == again["calibrate"] and stages["halo"] == again["halo"]
    assert stages["ablate channels"] != again["ablate channels"]
    off = {**ASKED, "ablation": {"enabled": False}}
    quiet_run(small(**off), overwrite=True)
    assert not (result.folder / "analysis" / "ablation.json").exists()
    assert not (result.folder / "analysis" / "ranking_quality.json").exists()


def test_single_channels_need_no_core(small: Callable[..., RunConfig]) -> None:
    found = quiet_run(small(ablation={"enabled": True, "num_samples": 2, "channels": 4, "sites": 2}))
    assert (found.folder / "analysis" / "ranking_quality.csv").exists()
    assert not (found.folder / "analysis" / "ablation.json").exists()


def test_a_dry_run_tells_them(small: Callable[..., RunConfig]) -> None:
    console = Console(record=True, width=200)
    dry_run(small(**ASKED), console)
    text = console.export_text()
    assert "22 sets x 96 tokens" in text and "12 channels x 96 tokens" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ablation": {"channels": 3}}, "ablation.channels: would do nothing without 'enabled: true'"),
        ({"ablation": {"enabled": True}}, "ablation.enabled: would measure nothing: supernode.enabled is false"),
        ({"ablation": {"enabled": True, "channels": 3, "draws": 5}}, "ablation.draws: would do nothing without a core"),
        (
            {"supernode": {"enabled": True}, "ablation": {"enabled": True, "sites": 5}},
            "ablation.sites: would do nothing without ablation.channels",
        ),
        (
            {"supernode": {"enabled": True}, "ablation": {"enabled": True}, "evaluation": {"enabled": False}},
            "ablation.enabled: needs the held-out text",
        ),
        (
            {"supernode": {"enabled": True}, "ablation": {"enabled": True, "num_samples": 5}},
            r"ablation.num_samples: more than evaluation.num_samples \(4\)",
        ),
        ({"ablation": {"enabled": True, "dose_shares": [2.0]}}, "dose_shares"),
        ({"ablation": {"enabled": True, "chanels": 3}}, "channels"),
    ],
)
def test_keys_that_would_do_nothing(small: Callable[..., RunConfig], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**changes)
