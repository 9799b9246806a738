"""What is done is not done again, what is damaged is, and a run that was cut off ends as if it never was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from faults import stop_at
from ffnscope.calibrate import passes as calibrating
from ffnscope.errors import ArtifactError
from ffnscope.evaluate import measuring
from ffnscope.run import RunConfig, config_from_dict, load_config
from runs import quiet_run, results, small_run, strict_json

STATISTICS, PART = "statistics.safetensors", "statistics.part.safetensors"


@pytest.fixture(scope="module")
def unbroken(checkpoint: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Results of the small run, made in one go."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    return results(quiet_run(config_from_dict(small_run(checkpoint, texts, out))).folder)


def stages(folder: Path) -> dict[str, Any]:
    return strict_json(folder / "ledger.json")["stages"]


def stamps(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and bytes of every file but the log, which grows."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.log"]
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# --- nothing twice ---


def test_second_run_changes_no_file(small: Callable[..., RunConfig]) -> None:
    first = quiet_run(small(output={"plots": True}, metrics={"scar": {"enabled": True}}))
    before = stamps(first.folder)
    second = quiet_run(small(output={"plots": True}))
    assert stamps(second.folder) == before
    assert second.rows == first.rows
    assert second.samples == first.samples
    assert "already done" in (first.folder / "run.log").read_text()


def test_another_configuration_is_refused_by_its_keys(small: Callable[..., RunConfig]) -> None:
    folder = quiet_run(small()).folder
    before = stamps(folder)
    with pytest.raises(ArtifactError) as caught:
        quiet_run(small(pruning={"ratios": [0.1]}, experiment={"seed": 1}))
    assert "experiment.seed, calibration.seed, pruning.ratios" in str(caught.value)
    assert "or its experiment_config.yaml was edited or damaged" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert stamps(folder) == before


def test_overwrite_keeps_what_is_current(small: Callable[..., RunConfig], unbroken: dict[str, str]) -> None:
    folder = quiet_run(small(pruning={"ratios": [0.1, 0.5]})).folder
    before, ledger = stamps(folder), stages(folder)
    quiet_run(small(), overwrite=True)
    after = stamps(folder)
    for name in (STATISTICS, "scores.safetensors", "scores.json"):
        assert after[name] == before[name]
    assert {name for name in after if name.startswith("plans/")} == {
        f"plans/{metric}-{ratio}.json" for metric in ("random", "scar_loss_proxy") for ratio in (0.25, 0.5)
    }
    assert {name for name, row in stages(folder).items() if row == ledger[name]} == {"calibrate", "score"}
    kept = {name: digest for name, digest in results(folder).items() if not name.startswith("evaluation/")}
    assert kept.items() <= unbroken.items()


def test_a_new_plan_computes_only_its_own_windows(
    small: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_run(small(pruning={"ratios": [0.25]}))
    masks = stop_at(monkeypatch, measuring, "as_pruned", -1)
    quiet_run(small(pruning={"ratios": [0.25, 0.5]}), overwrite=True)
    assert len(masks) == 2 * 2  # two new plans, two batches


def test_overwrite_deletes_what_is_no_longer_asked_for(small: Callable[..., RunConfig]) -> None:
    folder = quiet_run(small(output={"plots": True})).folder
    quiet_run(small(pruning={"enabled": False}, evaluation={"enabled": False}), overwrite=True)
    assert set(results(folder)) == {STATISTICS, "scores.safetensors", "scores.json"}
    assert list(stages(folder)) == ["calibrate", "score", "report"]
    assert list(strict_json(folder / "summary.json")["stages"]) == ["calibrate", "score", "report"]


def test_a_change_of_the_core_is_drawn_again(small: Callable[..., RunConfig]) -> None:
    off = {"pruning": {"enabled": False}, "evaluation": {"enabled": False}, "output": {"plots": True}}
    folder = quiet_run(small(**off)).folder
    before = stamps(folder)
    quiet_run(small(**off, supernode={"enabled": True, "top_k": 5}), overwrite=True)
    name = "plots/scores_scar_loss_proxy.png"
    assert stamps(folder)[name][1] != before[name][1]


# --- damage ---


@pytest.mark.parametrize(
    "name", [STATISTICS, "scores.safetensors", "plans/random-0.5.json", "evaluation/windows_0.json"]
)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted"])
def test_damage_is_noticed_and_mended(
    small: Callable[..., RunConfig], unbroken: dict[str, str], name: str, damage: str
) -> None:
    path = quiet_run(small()).folder / name
    content = path.read_bytes()
    middle = len(content) - 40
    if damage == "truncated":
        path.write_bytes(content[:middle])
    elif damage == "flipped":
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.unlink()
    assert results(quiet_run(small()).folder) == unbroken


@pytest.mark.parametrize("name", ["pruning_results.csv", "results.md", "samples.json", "scores.json", "summary.json"])
def test_a_damaged_report_is_written_again(small: Callable[..., RunConfig], name: str) -> None:
    folder = quiet_run(small()).folder
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(b'{"value": NaN')
    quiet_run(small())
    changed = (folder / name).read_bytes()
    if name == "summary.json":
        assert strict_json(folder / name)["stages"].keys() == stages(folder).keys()
        assert (folder / "run.log").read_text().count("summary.json was damaged or changed, and is written again") == 1
        quiet_run(small())
        assert (folder / "run.log").read_text().count("summary.json was damaged or changed") == 1
    else:
        assert changed == before


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"kind": "plan"}',
        '{"kind": "ledger", "schema": 1, "stages": {"score": {}}}',
        '{"kind": "ledger", "schema": 1, "stages": {"score": {"key": "k", "files": {"../x": "y"}}}}',
    ],
)
def test_a_damaged_ledger_is_named(small: Callable[..., RunConfig], text: str) -> None:
    folder = quiet_run(small()).folder
    (folder / "ledger.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"ledger\.json.*\. Delete it, and all stages run again\."):
        quiet_run(small())


def test_without_its_ledger_everything_runs_again(small: Callable[..., RunConfig], unbroken: dict[str, str]) -> None:
    folder = quiet_run(small()).folder
    (folder / "ledger.json").unlink()
    assert results(quiet_run(small()).folder) == unbroken


# --- interrupts ---


def test_interrupted_calibration_goes_on(
    small: Callable[..., RunConfig], unbroken: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, calibrating, "observe_batch", 3)
        quiet_run(config)
    assert (config.output_dir / PART).is_file()
    assert "stopped by KeyboardInterrupt" in (config.output_dir / "run.log").read_text()
    batches = stop_at(monkeypatch, calibrating, "observe_batch", -1)
    assert results(quiet_run(config).folder) == unbroken
    assert len(batches) == 1  # the third of three


def test_interrupted_evaluation_goes_on(
    small: Callable[..., RunConfig], unbroken: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, measuring, "as_pruned", 6)  # the second plan of the second batch
        quiet_run(config)
    assert list(stages(config.output_dir)) == ["calibrate", "score", "plan"]
    masks = stop_at(monkeypatch, measuring, "as_pruned", -1)
    assert results(quiet_run(config).folder) == unbroken
    assert len(masks) == 4


@pytest.mark.parametrize("name", [PART, "evaluation/windows_0.json"])
def test_damaged_state_of_an_interrupted_stage(
    small: Callable[..., RunConfig], unbroken: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = small()
    module, function = (calibrating, "observe_batch") if name == PART else (measuring, "_batches")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, module, function, 2)
        quiet_run(config)
    path = config.output_dir / name
    path.write_bytes(path.read_bytes()[:-7])
    assert results(quiet_run(config).folder) == unbroken
    log = (config.output_dir / "run.log").read_text()
    assert f"{path} cannot be read" in log
    assert "It is deleted, and this stage starts anew." in log


@pytest.fixture(scope="module")
def longer(checkpoint: Path, texts: Path) -> Callable[[Path], dict[str, Any]]:
    """A run of many small batches, long enough to be cut off from outside."""

    def make(out: Path) -> dict[str, Any]:
        calibration = {"num_samples": 60, "max_length": 64, "batch_size": 1}
        evaluation = {"num_samples": 400, "samples": {"enabled": False}}  # seconds, also where the tests have to wait
        one = {"dataset": {"batch_size": 1}}
        return small_run(checkpoint, texts, out, calibration=calibration, evaluation=evaluation, **one)

    return make


@pytest.fixture(scope="module")
def longer_unbroken(
    longer: Callable[[Path], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    return results(quiet_run(config_from_dict(longer(tmp_path_factory.mktemp("whole") / "out"))).folder)


@pytest.mark.parametrize(
    ("sent", "waits_for", "status"),
    [(signal.SIGKILL, PART, -signal.SIGKILL), (signal.SIGINT, "evaluation/windows_0.json", 130)],
    ids=["kill", "int"],
)
def test_a_killed_process_loses_nothing(
    longer: Callable[[Path], dict[str, Any]],
    longer_unbroken: dict[str, str],
    tmp_path: Path,
    sent: signal.Signals,
    waits_for: str,
    status: int,
) -> None:
    path, folder = tmp_path / "run.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(longer(folder)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ffnscope", "run", str(path)]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs of a shell ignore it
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, preexec_fn=heard, **pipes)
    while not (folder / waits_for).exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert "Traceback" not in output
    assert not (folder / "summary.json").exists()
    (folder / f".scores.json.{'0' * 32}.tmp").touch()  # what a process leaves that was killed while it wrote
    assert results(quiet_run(load_config(path)).folder) == longer_unbroken
    assert not list(folder.rglob("*.tmp"))
