"""The analyses of a run: files, keys that do something, resumption."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ffnscope.calibrate import passes as calibrating
from ffnscope.errors import ConfigError, UsageError
from ffnscope.io import read_scores, read_stats, read_tensors
from ffnscope.run import RunConfig, RunResult, analyses, config_from_dict
from ffnscope.run.estimate import estimate
from runs import quiet_run, results, small_run, strict_json
from tiny import D_FF, LAYERS

TABLES = ("concentration", "core_overlap", "core_stability", "halo", "cross_layer", "protection")
BLOCKS: dict[str, Any] = {
    "calibration": {"mode": "lines"},
    "metrics": {"enabled": ["activation_outlier_index", "weight_magnitude"]},
    "concentration": {"enabled": True},
    "halo": {"enabled": True},
    "cross_layer": {"enabled": True},
    "supernode": {"enabled": True, "top_k": 2, "null_pool": 30, "stability": {"enabled": True, "seeds": [1]}},
    "pruning": {"enabled": True, "ratios": [0.5], "algorithms": ["scar_loss_proxy", "supernode_protection_score"]},
    "evaluation": {"samples": {"enabled": False}},
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """Calibration text of many documents, one per row."""
    folder = tmp_path_factory.mktemp("lines")
    words = (texts / "train.txt").read_text().split()
    rows = [{"text": " ".join(words[60 * i : 60 * i + 60])} for i in range(40)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "train.jsonl"


@pytest.fixture(scope="module")
def unbroken(checkpoint: Path, texts: Path, lines: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    out = tmp_path_factory.mktemp("analyses") / "out"
    blocks = {**BLOCKS, "dataset": {"name": str(lines)}}
    return quiet_run(config_from_dict(small_run(checkpoint, texts, out, **blocks)))


@pytest.fixture
def asked(small: Callable[..., RunConfig], lines: Path) -> Callable[..., RunConfig]:
    def make(**changes: Any) -> RunConfig:
        return small(**{**BLOCKS, "dataset": {"name": str(lines)}, **changes})

    return make


def test_every_table_is_there_twice(unbroken: RunResult):
    for name in TABLES:
        found = strict_json(unbroken.folder / "analysis" / f"{name}.json")
        with (unbroken.folder / "analysis" / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(found["rows"]) > 0
        assert [*rows[0]] == [*found["rows"][0]]


def test_concentration(unbroken: RunResult):
    found = strict_json(unbroken.folder / "analysis" / "concentration.json")
    assert found["facts"]["documents"] == found["facts"]["groups"] == 6
    assert found["facts"]["level"] == 0.95
    assert found["facts"]["medians"]["scar_loss_proxy"]["sentence"].startswith("The top 1 % of the channels")
    assert set(found["facts"]["refused"]) == {"supernode_protection_score"}
    row = next(r for r in found["rows"] if r["metric"] == "scar_loss_proxy" and r["site"] == "all")
    assert row["n_channels"] == LAYERS * D_FF and row["top1_low"] <= row["top1"] <= row["top1_high"]
    curves = strict_json(unbroken.folder / "analysis" / "lorenz.json")
    assert len(curves["fractions"]) == len(curves["curves"]["scar_loss_proxy"]["all"]) == 101


def test_channel_sets(unbroken: RunResult):
    tensors, facts = read_tensors(unbroken.folder / "analysis" / "channel_sets.safetensors")
    scores, _ = read_scores(unbroken.folder / "scores.safetensors")
    first, second = unbroken.scores["scar_loss_proxy"].sites
    for site in (first, second):
        top = scores["scar_loss_proxy"].values[site].topk(2).indices.sort().values
        assert tensors[f"{site.name}/core"].tolist() == top.tolist()
        assert tensors[f"{site.name}/write_halo"].numel() == round(0.1 * (D_FF - 2))
        assert tensors[f"{site.name}/activation_outliers"].numel() == 2
        assert tensors[f"{site.name}/top/weight_magnitude"].numel() == 2
    assert f"{second.name}/read_halo" not in tensors
    assert facts["next_sites"] == {first.name: second.name}


def test_core_tables(unbroken: RunResult):
    overlap = strict_json(unbroken.folder / "analysis" / "core_overlap.json")
    assert overlap["facts"] == {
        "core": "scar_loss_proxy",
        "activation_outliers": "scar_activation_power",
        "refused": {"supernode_protection_score": "its scores lift the core above all other channels"},
    }
    assert "scar_loss_proxy" not in {r["other"] for r in overlap["rows"]}
    stability = strict_json(unbroken.folder / "analysis" / "core_stability.json")
    assert [r["compared"] for r in stability["rows"]] == 3 * ["seed 1"] + 3 * ["halves"]


def test_only_the_measured_channels_are_on_disk(unbroken: RunResult):
    stats, _ = read_stats(unbroken.folder / "statistics_core.safetensors")
    first, second = stats
    assert stats[first].values["taylor_core"].shape == stats[first].values["taylor_next"].shape == (32, D_FF)
    assert set(stats[second].values) == {"taylor_core"}


def test_protection_is_compared_with_the_plain_loss_proxy(unbroken: RunResult):
    (row,) = strict_json(unbroken.folder / "analysis" / "protection.json")["rows"]
    assert (row["first"], row["second"]) == ("supernode_protection_score-0.5", "scar_loss_proxy-0.5")
    perplexity = {r.label: r.results[0].value for r in unbroken.rows}
    assert row["perplexity_first"] == pytest.approx(perplexity[row["first"]])
    assert row["perplexity_second"] == pytest.approx(perplexity[row["second"]])


def test_scores_are_those_without_analyses(unbroken: RunResult, asked: Callable[..., RunConfig]):
    plain = asked(concentration={}, halo={}, cross_layer={}, supernode={"enabled": True, "top_k": 2})
    found = quiet_run(plain)
    for name, one in found.scores.items():
        for site, values in one.values.items():
            assert unbroken.scores[name].values[site].tolist() == pytest.approx(values.tolist(), rel=1e-6)
    assert not (found.folder / "analysis" / "halo.csv").exists()


def test_a_second_run_does_nothing_and_one_key_redoes_one_stage(
    asked: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
):
    first = quiet_run(asked())
    before, ledger = results(first.folder), (first.folder / "ledger.json").read_bytes()

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this was done already")

    for name in ("concentration", "core_stability", "cross_layer"):
        monkeypatch.setattr(analyses, name, never)
    monkeypatch.setattr(calibrating, "observe_batch", never)
    quiet_run(asked())
    assert (first.folder / "ledger.json").read_bytes() == ledger
    quiet_run(asked(halo={"enabled": True, "seed": 5}), overwrite=True)
    after = results(first.folder)
    changed = {name for name in before if before[name] != after[name]}
    assert (
        {"analysis/halo.json", "analysis/halo.csv"}
        <= changed
        <= {
            "analysis/halo.json",
            "analysis/halo.csv",
            "analysis/halo_sets.safetensors",
            "analysis/channel_sets.safetensors",
        }
    )


def test_an_interrupt_in_an_analysis_loses_nothing_before_it(
    asked: Callable[..., RunConfig], unbroken: RunResult, monkeypatch: pytest.MonkeyPatch
):
    real = analyses.halo_analysis

    def cut(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(analyses, "halo_analysis", cut)
    with pytest.raises(KeyboardInterrupt):
        quiet_run(asked())
    monkeypatch.setattr(analyses, "halo_analysis", real)
    monkeypatch.setattr(calibrating, "observe_batch", cut)
    found = quiet_run(asked())
    mine, other = results(found.folder), results(unbroken.folder)
    tables = [name for name in other if name.startswith("analysis/") and name.endswith(".csv")]
    assert {name: mine[name] for name in tables} == {name: other[name] for name in tables}


def test_the_estimate_tells_of_the_analyses(asked: Callable[..., RunConfig]):
    found = estimate(asked())
    stages = {line.stage: line.what for line in found.lines}
    assert stages["concentration"] == stages["halo"] == stages["cross layer"] == "200 draws"
    assert stages["stability"].startswith("the core of 1 other calibrations: ")
    (names,) = found.statistics
    assert {"taylor_next", "act_next", "taylor_core", "taylor_sq_by_document", "targets_by_document"} <= set(names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"supernode": {"enabled": True, "top_k": 30}}, "null cores of 30 channels need as many others .* got 18"),
        (
            {"supernode": {"enabled": True, "top_k": 4, "null_pool": 3}},
            "null cores of 4 channels need .* got 3",
        ),
        (
            {
                "supernode": {"enabled": True, "top_k": 4},
                "ablation": {"enabled": True, "dose_sparsity": 0.05, "num_samples": 2},
            },
            "a mask of 2 channels cannot hold 3 of 4 core channels, with 44 others",
        ),
    ],
)
def test_a_core_that_is_too_large_stops_before_the_calibration(
    asked: Callable[..., RunConfig], tmp_path: Path, changes: dict[str, Any], message: str
):
    config = asked(**changes)
    with pytest.raises(UsageError, match=message):
        quiet_run(config)
    assert not list(tmp_path.rglob("statistics*.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"halo": {"enabled": True}, "supernode": {}}, "needs the supernode core, but supernode.enabled is false"),
        ({"cross_layer": {"enabled": True}, "halo": {}, "supernode": {}}, "needs the supernode core"),
        ({"supernode": {"stability": {"enabled": True}}, "halo": {}, "cross_layer": {}}, "needs the supernode core"),
        ({"supernode": {"enabled": True, "stability": {"seeds": [1]}}}, "would do nothing without 'enabled: true'"),
        (
            {"supernode": {"enabled": True, "null_pool": 9}, "halo": {}, "cross_layer": {}},
            "would do nothing: neither halo nor cross_layer is enabled",
        ),
        ({"supernode": {"enabled": True, "halo_fraction": 0.7}}, "must be at most 0.5 with halo.enabled"),
        ({"halo": {"enabled": True, "draws": 50}}, "must be at least 200; got 50"),
        ({"halo": {"enabled": True, "fraction": 0.2}}, "unknown key 'fraction'"),
        (
            {"concentration": {"enabled": True, "jackknife": True}, "metrics": {"scar": {"num_samples": 2}}},
            "needs all windows whole",
        ),
        (
            {
                "metrics": {"scar": {"enabled": False}},
                "supernode": {"enabled": True, "score_metric": "wanda"},
                "pruning": {},
            },
            "needs the backward pass, but metrics.scar.enabled is false",
        ),
    ],
)
def test_keys_that_would_do_nothing_are_refused(asked: Callable[..., RunConfig], changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        asked(**changes)


def test_the_jackknife_fills_in(asked: Callable[..., RunConfig]):
    off: dict[str, Any] = {"halo": {}, "cross_layer": {}, "supernode": {}, "pruning": {}, "metrics": {}}
    off["metrics"] = {"enabled": ["average_redundancy"]}
    found = quiet_run(asked(**off, concentration={"enabled": True, "jackknife": True}))
    methods = strict_json(found.folder / "analysis" / "concentration.json")["facts"]["method"]
    assert methods["average_redundancy"] == "jackknife of 6 groups of documents"
    assert methods["scar_loss_proxy"] == "bootstrap of 6 groups of documents"
