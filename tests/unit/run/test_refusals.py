"""What stops a run: each with its reason, at once where that is possible, and without half-written files."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import POSITIONS, make_checkpoint
from faults import small_files
from ffnscope.errors import ArtifactError, DeviceError, ModelError, NonFiniteError, TextError, UsageError
from ffnscope.run import RunConfig, outputs
from ffnscope.run.estimate import estimate
from ffnscope.run.folder import open_folder
from runs import quiet_run, results, strict_json

# --- the folder ---


def test_output_is_a_file(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ArtifactError, match=r"out is a file; output\.dir must be a folder"):
        quiet_run(small(), overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_output_is_below_a_file(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match=r"cannot write .*file/out: Not a directory"):
        quiet_run(small(output={"dir": str(tmp_path / "file" / "out")}))


def test_a_foreign_folder_is_refused(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    (tmp_path / "out" / ".thesis.tex.tmp").write_text("mine too")
    with pytest.raises(ArtifactError, match=r"is not empty and holds no experiment_config\.yaml"):
        quiet_run(small())
    assert len(list((tmp_path / "out").iterdir())) == 2
    quiet_run(small(), overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"
    assert (tmp_path / "out" / ".thesis.tex.tmp").read_text() == "mine too"


def test_an_empty_folder_is_taken(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert quiet_run(small()).rows


def test_held_out_windows_that_the_model_cannot_take_are_refused_before_any_pass(
    small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small(evaluation={"max_length": POSITIONS + 1})
    match = rf"windows of {POSITIONS + 1} tokens do not fit .*Lower evaluation\.max_length to at most {POSITIONS}\."
    with pytest.raises(UsageError, match=match):
        quiet_run(config)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    with pytest.raises(UsageError, match=match):
        estimate(config)


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe", b""])
def test_a_configuration_that_cannot_be_read(small: Callable[..., RunConfig], tmp_path: Path, content: bytes) -> None:
    folder = quiet_run(small()).folder
    before = results(folder)
    (folder / "experiment_config.yaml").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"cannot be read|different: everything"):
        quiet_run(small())
    quiet_run(small(), overwrite=True)
    assert results(folder) == before


def test_two_runs_in_one_folder(small: Callable[..., RunConfig]) -> None:
    with open_folder(small()), pytest.raises(ArtifactError, match="another process is at work in"):
        quiet_run(small())
    quiet_run(small())


def test_a_system_without_folder_locks_runs_too(
    small: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fcntl", "resource"):  # as on Windows
        monkeypatch.setitem(sys.modules, name, None)
    folder = quiet_run(small()).folder
    peaks = [row["peak_memory_bytes"]["resident"] for row in strict_json(folder / "ledger.json")["stages"].values()]
    assert all(10 * 2**20 < peak < 2**40 for peak in peaks)
    assert "calibrate: already done" in (quiet_run(small()).folder / "run.log").read_text()


def test_a_run_that_failed_at_once_can_be_mended(small: Callable[..., RunConfig]) -> None:
    with pytest.raises(TextError):
        quiet_run(small(calibration={"num_samples": 100_000}))
    assert quiet_run(small()).rows


# --- what is not there ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda(small: Callable[..., RunConfig]) -> None:
    with pytest.raises(DeviceError, match=r"device 'cuda' was asked for, but this machine has no CUDA device"):
        quiet_run(small(experiment={"device": "cuda"}))


@pytest.mark.parametrize("block", ["dataset", "evaluation"])
def test_a_missing_text_stops_before_the_calibration(small: Callable[..., RunConfig], block: str) -> None:
    config = small(**{block: {"name": "./missing.txt"}})
    with pytest.raises(TextError, match=r"missing\.txt does not exist"):
        quiet_run(config)
    assert results(config.output_dir) == {}


@pytest.mark.parametrize("block", ["calibration", "evaluation"])
def test_a_short_text_stops_before_the_calibration(small: Callable[..., RunConfig], block: str) -> None:
    config = small(**{block: {"num_samples": 100_000}})
    with pytest.raises(TextError, match=r"100,000 windows of 32 tokens were asked of .*; it has \d"):
        quiet_run(config)
    assert results(config.output_dir) == {}


def test_a_missing_model(small: Callable[..., RunConfig]) -> None:
    with pytest.raises(ModelError, match="nothing-here does not exist"):
        quiet_run(small(model={"model_id": "./nothing-here"}))


def test_plots_without_matplotlib_stop_at_once(
    small: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs.importlib.util, "find_spec", lambda name: None)
    config = small(output={"plots": True})
    with pytest.raises(UsageError, match=r"pip install 'ffnscope\[plots\]', or set output\.plots: false"):
        quiet_run(config)
    assert not config.output_dir.exists()


def test_more_core_than_is_kept(small: Callable[..., RunConfig]) -> None:
    config = small(supernode={"enabled": True, "top_k": 30})
    with pytest.raises(UsageError, match=r"fewer than the 60 that are protected"):
        quiet_run(config)
    again = quiet_run(small(supernode={"enabled": True, "top_k": 20}), overwrite=True)
    assert (again.folder / "run.log").read_text().count("calibrate: started") == 1  # the statistics were kept


# --- numbers that are none ---


@pytest.mark.parametrize("weight", ["mlp.down_proj", "mlp.up_proj"])
def test_nan_in_a_checkpoint_names_the_site(small: Callable[..., RunConfig], tmp_path: Path, weight: str) -> None:
    folder = make_checkpoint(tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.1.{weight}.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = small(model={"model_id": str(folder)})
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp is NaN or infinite.*look for NaN") as caught:
        quiet_run(config)
    cure = f"The weight model.layers.1.{weight}.weight holds NaN or infinity: load the model again from an intact"
    assert str(caught.value).count(cure) == 1
    assert results(config.output_dir) == {}
    assert "stopped by NonFiniteError" in (config.output_dir / "run.log").read_text()


# --- a full disk ---


@pytest.mark.parametrize("size", [900, 3000, 8000])
def test_a_full_disk_leaves_nothing_half_written(
    small: Callable[..., RunConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str], size: int
) -> None:
    config = small()
    with small_files(size), pytest.raises(ArtifactError, match=r"cannot write .*out/.*File too large"):
        quiet_run(config)
    assert not list(config.output_dir.rglob("*.tmp"))
    assert "Traceback" not in capfd.readouterr().err
    whole = quiet_run(small(output={"dir": str(tmp_path / "whole")}))
    assert results(quiet_run(config).folder) == results(whole.folder)


def test_a_log_that_cannot_be_written_stops_nothing(
    small: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    config = small()
    config.output_dir.mkdir()
    (config.output_dir / "run.log").symlink_to("/dev/full")
    assert quiet_run(config).rows
    assert capfd.readouterr().err == ""


def test_logging_is_left_as_it_was(small: Callable[..., RunConfig]) -> None:
    root, own = logging.getLogger(), logging.getLogger("ffnscope.run")
    before: tuple[Any, ...] = (list(root.handlers), own.level, own.handlers)
    quiet_run(small())
    assert before == (list(root.handlers), own.level, own.handlers)
