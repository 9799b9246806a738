"""A run with metrics of both levels, with a reference model, and with large sums."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import ffnscope
from checkpoints import make_checkpoint
from ffnscope.calibrate import passes as calibrating
from ffnscope.errors import ConfigError, ModelError, UsageError
from ffnscope.io import read_scores, read_stats
from ffnscope.run import RunConfig, RunResult, config_from_dict, load_config, steps
from ffnscope.run.estimate import estimate
from runs import quiet_run, results, small_run, strict_json
from tiny import D_FF

ALGORITHMS = ["supernode_protection_score", "sparsegpt", "composite"]
FIRST, SECOND = "statistics.safetensors", "statistics_core.safetensors"
BLOCKS: dict[str, Any] = {
    "metrics": {"composite": {"parts": {"wanda": 1.0, "magnitude": 0.5}}},
    "supernode": {"enabled": True, "core_fraction": 0.1, "halo_fraction": 0.2},
    "pruning": {"enabled": True, "ratios": [0.5], "algorithms": ALGORITHMS},
    "evaluation": {"samples": {"enabled": False}},
}


@pytest.fixture
def two_levels(small: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    def make(**supernode: Any) -> RunConfig:
        return small(**{**BLOCKS, "supernode": {**BLOCKS["supernode"], **supernode}})

    return make


@pytest.fixture(scope="module")
def unbroken(checkpoint: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    return quiet_run(config_from_dict(small_run(checkpoint, texts, out, **BLOCKS)))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by every batch of a calibration pass."""
    real, seen = calibrating.observe_batch, []

    def counted(*args: Any, **kwargs: Any) -> None:
        seen.append(len(seen))
        real(*args, **kwargs)

    monkeypatch.setattr(calibrating, "observe_batch", counted)
    return seen


def ledger(folder: Path) -> dict[str, Any]:
    return strict_json(folder / "ledger.json")["stages"]


def log(folder: Path) -> str:
    return (folder / "run.log").read_text(encoding="utf-8")


# --- two passes ---


def test_both_passes_are_stages_with_files(unbroken: RunResult) -> None:
    folder = unbroken.folder
    assert list(ledger(folder)) == [
        *("calibrate", "calibrate core", "score", "core overlap", "channel sets", "plan", "evaluate 1"),
        "report",
    ]
    first, second = (read_stats(folder / name)[0] for name in (FIRST, SECOND))
    for site, part in first.items():
        assert "h_outer" in part.values
        assert set(second[site].values) == {"taylor_core"}
        assert second[site].values["taylor_core"].shape == (round(0.1 * D_FF), D_FF)
    found, _ = read_scores(folder / "scores.safetensors")
    assert list(found)[:3] == ALGORITHMS
    assert found["supernode_protection_score"].facts["params"]["halo_fraction"] == 0.2
    assert found["supernode_protection_score"].facts["core"]["metric"] == "scar_loss_proxy"
    assert found["composite"].facts["params"] == {"parts": {"wanda": 1.0, "magnitude": 0.5}, "normalise": "rank"}
    assert [row.label for row in unbroken.rows] == ["dense", *(f"{name}-0.5" for name in ALGORITHMS)]
    core = ffnscope.top_core(found["scar_loss_proxy"], 0.1)
    for plan in unbroken.plans.values():
        assert all(set(core[site].tolist()) <= set(kept.tolist()) for site, kept in plan.kept.items())


@pytest.mark.usefixtures("two_passes")
def test_a_second_run_skips_both_passes(two_levels: Callable[..., RunConfig], batches: list[int]) -> None:
    folder = quiet_run(two_levels()).folder
    before = results(folder)
    assert len(batches) == 3 + 3
    quiet_run(two_levels())
    assert len(batches) == 3 + 3
    assert results(folder) == before
    assert "calibrate core: already done" in log(folder)


@pytest.mark.usefixtures("two_passes")
def test_another_core_redoes_only_the_second_pass_and_what_follows(
    two_levels: Callable[..., RunConfig], batches: list[int]
) -> None:
    folder = quiet_run(two_levels()).folder
    before, first = ledger(folder), (folder / FIRST).stat().st_mtime_ns
    quiet_run(two_levels(core_fraction=0.25), overwrite=True)
    assert len(batches) == 3 + 3 + 3
    after = ledger(folder)
    assert {name for name in after if after[name] == before[name]} == {"calibrate"}
    assert (folder / FIRST).stat().st_mtime_ns == first
    (part, *_) = read_stats(folder / SECOND)[0].values()
    assert part.values["taylor_core"].shape[0] == round(0.25 * D_FF)


def test_the_core_does_not_matter_to_metrics_that_do_not_read_it(small: Callable[..., RunConfig]) -> None:
    folder = quiet_run(small(supernode={"enabled": True, "core_fraction": 0.1})).folder
    before = ledger(folder)
    quiet_run(small(supernode={"enabled": True, "core_fraction": 0.2}), overwrite=True)
    after = ledger(folder)
    assert {name for name in after if after[name] == before[name]} == {"calibrate", "score"}


@pytest.mark.usefixtures("two_passes")
def test_without_core_metrics_the_second_file_goes(
    two_levels: Callable[..., RunConfig], small: Callable[..., RunConfig], batches: list[int]
) -> None:
    folder = quiet_run(two_levels()).folder
    assert (folder / SECOND).exists()
    metrics = {**BLOCKS["metrics"], "enabled": ["llm_pruner"]}  # reads taylor_sum, as the core metrics do
    pruning = {**BLOCKS["pruning"], "algorithms": ALGORITHMS[1:]}
    off = {**BLOCKS, "metrics": metrics, "supernode": {"enabled": True}, "pruning": pruning}
    quiet_run(small(**off), overwrite=True)
    assert not (folder / SECOND).exists()
    assert "calibrate core" not in ledger(folder)
    assert len(batches) == 3 + 3  # the first pass is the same


def test_one_pass_gives_the_results_of_two(
    two_levels: Callable[..., RunConfig], unbroken: RunResult, batches: list[int], request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("two_passes")
    twice = quiet_run(two_levels())
    assert len(batches) == 3 + 3
    for name in (FIRST, SECOND):
        once, again = (read_stats(result.folder / name)[0] for result in (unbroken, twice))
        for site, part in once.items():
            for statistic, value in part.values.items():
                assert value.allclose(again[site].values[statistic], rtol=1e-5, atol=1e-12), statistic


def test_an_interrupt_in_the_only_pass_repeats_no_batch(
    two_levels: Callable[..., RunConfig], unbroken: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = two_levels()
    real, calls = calibrating.observe_batch, []

    def stop_at_the_second(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    monkeypatch.setattr(calibrating, "observe_batch", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        quiet_run(config)
    assert (config.output_dir / "statistics.part.safetensors").is_file()
    folder = quiet_run(config).folder
    assert len(calls) == 1 + 1 + 2
    assert results(folder) == results(unbroken.folder)


@pytest.mark.usefixtures("two_passes")
def test_an_interrupt_in_the_second_pass_keeps_the_first(
    two_levels: Callable[..., RunConfig], unbroken: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = two_levels()
    real, calls = calibrating.observe_batch, []

    def stop_at_the_fifth(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    monkeypatch.setattr(calibrating, "observe_batch", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        quiet_run(config)
    assert list(ledger(config.output_dir)) == ["calibrate"]
    assert (config.output_dir / "statistics_core.part.safetensors").is_file()
    folder = quiet_run(config).folder
    assert len(calls) == 3 + 2 + 2  # one batch of the second pass was kept
    assert results(folder) == results(unbroken.folder)
    assert not (folder / "statistics_core.part.safetensors").exists()


@pytest.mark.usefixtures("two_passes")
def test_dry_run_tells_both_passes(two_levels: Callable[..., RunConfig]) -> None:
    found = estimate(two_levels())
    assert [line.stage for line in found.lines][:2] == ["calibrate 1", "calibrate 2"]
    assert "h_outer" in found.statistics[0]
    assert found.statistics[1] == ["taylor_core"]


def test_the_metric_of_the_core_is_scored_for_it_even_when_the_core_is_off(small: Callable[..., RunConfig]) -> None:
    off = {"metrics": {"scar": {"enabled": False}}, "evaluation": {"enabled": False}}
    result = quiet_run(small(**off, pruning={"algorithms": ["supernode_connectivity_score"], "ratios": [0.5]}))
    assert list(result.scores) == ["supernode_connectivity_score"]
    assert (result.folder / SECOND).exists()


# --- large sums ---


def test_large_sums_are_announced(
    two_levels: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = two_levels()
    monkeypatch.setattr(steps, "ANNOUNCED_BYTES", 10_000)
    folder = quiet_run(config).folder
    stats = [part for name in (FIRST, SECOND) for part in read_stats(folder / name)[0].values()]
    size = sum(8 * value.numel() for part in stats for value in part.values.values())
    assert size > 2 * 8 * D_FF**2
    found = estimate(config).calibration
    assert found.disk == size < found.sums < found.memory
    assert found.told in log(folder)


def test_small_sums_are_not_worth_a_word(unbroken: RunResult) -> None:
    assert "MiB of memory" not in log(unbroken.folder)


# --- a reference model ---


def with_reference(reference: Any) -> dict[str, Any]:
    return {
        "model": {"reference_id": str(reference)},
        "pruning": {"enabled": True, "ratios": [0.5], "algorithms": ["delta_alignment"]},
        "metrics": {"scar": {"enabled": False}},
        "evaluation": {"samples": {"enabled": False}},
    }


def test_a_run_with_a_reference_model(small: Callable[..., RunConfig], tmp_path: Path, checkpoint: Path) -> None:
    reference = make_checkpoint(tmp_path / "before", seed=1)
    result = quiet_run(small(**with_reference(reference)))
    assert list(result.scores) == ["delta_alignment"]
    model, before = (ffnscope.load_model(str(path)).model for path in (checkpoint, reference))
    stats, _ = read_stats(result.folder / FIRST)
    expected = ffnscope.score(model, stats, "delta_alignment", reference=before)
    for site, value in result.scores["delta_alignment"].values.items():
        assert value.tolist() == expected.values[site].tolist()
    facts = read_scores(result.folder / "scores.safetensors")[1]
    assert facts["reference"] == {"model": str(reference), "hash": ffnscope.weights_hash(before)}


def test_another_reference_is_scored_again(small: Callable[..., RunConfig], tmp_path: Path, batches: list[int]) -> None:
    reference = make_checkpoint(tmp_path / "before", seed=1)
    folder = quiet_run(small(**with_reference(reference))).folder
    before = ledger(folder)
    make_checkpoint(reference, seed=2)  # the same path, other weights
    quiet_run(small(**with_reference(reference)))
    after = ledger(folder)
    assert len(batches) == 3
    assert after["calibrate"] == before["calibrate"]
    assert after["score"]["key"] != before["score"]["key"]


def test_a_reference_that_does_not_fit_stops_before_the_calibration(
    small: Callable[..., RunConfig], tmp_path: Path, batches: list[int]
) -> None:
    wider = make_checkpoint(tmp_path / "wider", intermediate_size=64)
    with pytest.raises(UsageError, match=r"the reference model has \(64, 32\) at model\.layers\.0\.mlp"):
        quiet_run(small(**with_reference(wider)))
    with pytest.raises(ModelError, match="does not exist"):
        quiet_run(small(**with_reference(tmp_path / "none")), overwrite=True)
    assert batches == []


# --- the file ---


@pytest.mark.parametrize(
    ("blocks", "text"),
    [
        ({"metrics": {"enabled": ["delta_alignment"]}}, "'delta_alignment' needs model.reference_id"),
        (
            {
                "metrics": {"enabled": ["supernode_protection_score"]},
                "supernode": {"score_metric": "supernode_connectivity_score"},
            },
            "'supernode_connectivity_score' itself needs the core; the core needs a metric without",
        ),
        (
            {"metrics": {"enabled": ["composite"], "composite": {"parts": {"wandas": 1.0}}}},
            "metrics.composite: Unknown metric 'wandas'. Did you mean 'wanda'?",
        ),
        (
            {"metrics": {"enabled": ["composite"], "composite": {"parts": {"supernode_protection_score": 1.0}}}},
            "metrics.composite: 'supernode_protection_score' cannot be a part of composite",
        ),
        (
            {"metrics": {"enabled": ["composite"], "composite": {"parts": {"wanda": 0.0}}}},
            "metrics.composite: composite needs parts: metric names with finite weights, not all 0",
        ),
    ],
)
def test_what_the_file_cannot_mean(blocks: dict[str, Any], text: str, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": {"model_id": str(checkpoint)}, **blocks}))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert text in str(caught.value)
    assert len(caught.value.problems) == 1


# --- results in a notebook ---


def test_the_frame_of_a_run_is_its_table(unbroken: RunResult) -> None:
    found = unbroken.to_pandas()
    with (unbroken.folder / "pruning_results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(found.columns) == list(rows[0])
    assert found["perplexity"].tolist() == [float(row["perplexity"]) for row in rows]
    assert "composite-0.5" in unbroken._repr_html_()
