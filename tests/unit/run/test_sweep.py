"""Sweeps: cells in folders of their own, finished ones not again, failures told, one report."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from checkpoints import make_checkpoint
from faults import stop_at
from ffnscope.calibrate import passes as calibrating
from ffnscope.errors import ArtifactError, ConfigError, SweepError
from ffnscope.report.run_folder import read_run
from ffnscope.report.sweep_page import sweep_grids
from ffnscope.run import (
    SweepResult,
    dry_run,
    executors,
    load_config,
    load_sweep,
    run_sweep,
    sweep_record,
    switches,
)
from ffnscope.run.dry_run import dry_run_sweep
from ffnscope.run.progress import Reporter
from runs import merged, quiet_run, results, small_run, strict_json

Write = Callable[..., Path]
SEEDS = {"calibration.seed": [0, 1]}
PLAIN = {"metrics": {"scar": {"enabled": False}}, "evaluation": {"samples": {"enabled": False}}}


@pytest.fixture
def written(checkpoint: Path, texts: Path, tmp_path: Path) -> Write:
    """Write a small configuration with a sweep."""

    def make(sweep: dict[str, Any], **changes: Any) -> Path:
        base = merged(PLAIN, {"pruning": {"algorithms": ["wanda"]}, "experiment": {"name": "tiny"}})
        asked = small_run(checkpoint, texts, tmp_path / "out", **merged(base, changes))
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**asked, "sweep": sweep}, sort_keys=False))
        return path

    return make


def quiet_sweep(file: Path, *, overwrite: bool = False, overrides: tuple[str, ...] = ()) -> SweepResult:
    return run_sweep(load_sweep(file, overrides), overwrite=overwrite, reporter=Reporter(Console(quiet=True)))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by every run from now on."""
    return stop_at(monkeypatch, executors, "run", -1)


# --- what a sweep leaves ---


def test_every_cell_is_the_run_of_its_configuration(written: Write, tmp_path: Path) -> None:
    method = {"plain": {"pruning.algorithms": ["wanda"]}, "floor": {"pruning.algorithms": ["random"]}}
    file = written({"method": method, **SEEDS}, output={"report": True})
    result = quiet_sweep(file)
    assert result.failed == {}
    assert [cell.name for cell in result.cells] == [f"method={m},seed={s}" for m in method for s in (0, 1)]
    config = load_config(result.folder / "method=floor,seed=1" / "experiment_config.yaml", [f"output.dir={tmp_path}/1"])
    assert (config.pruning.algorithms, config.seed) == (("random",), 1)
    alone, cell = results(quiet_run(config).folder), results(result.folder / "method=floor,seed=1")
    assert alone.pop("report.html") and cell.pop("report.html")  # it tells times
    assert cell == alone
    page = (result.folder / "report.html").read_text()
    assert "Sweep tiny" in page and "4 of 4 cells are finished" in page and "method=floor,seed=1" in page
    assert "Over seeds" in page and "method=plain" in page
    with (result.folder / "sweep_results.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 4 * 3  # dense and two sparsities
    assert {(row["sweep.method"], row["sweep.calibration.seed"]) for row in rows} == {
        (m, s) for m in method for s in "01"
    }
    expected = {row.label: row.results[0].value for row in read_run(result.folder / "method=plain,seed=0").rows}
    found = {row["label"]: float(row["perplexity"]) for row in rows if row["cell"] == "method=plain,seed=0"}
    assert found == pytest.approx(expected)
    assert strict_json(result.folder / "sweep_results.json")["rows"] == result.rows


def test_finished_cells_are_not_run_again(written: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(SEEDS)
    first = quiet_sweep(file)
    runs = counted(monkeypatch)
    again = quiet_sweep(file)
    assert runs == []
    assert again.rows == first.rows
    more = quiet_sweep(file, overrides=("sweep.calibration.seed=[0, 1, 2]",))
    assert len(runs) == 1
    assert [cell.name for cell in more.cells if cell.run] == ["seed=0", "seed=1", "seed=2"]


@pytest.mark.parametrize("damage", ["file", "ledger", "text", "record"])
def test_what_is_no_longer_as_it_was_is_looked_at_again(
    written: Write, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    text = tmp_path / "own.txt"
    text.write_text((texts / "train.txt").read_text())
    file = written({"calibration.seed": [0]}, dataset={"name": str(text)})
    result = quiet_sweep(file)
    before = results(result.folder)
    folder = result.folder / "seed=0"
    if damage == "file":
        (folder / "scores.safetensors").write_bytes(b"")
    elif damage == "ledger":
        (folder / "ledger.json").unlink()
    elif damage == "record":
        (result.folder / "sweep.json").unlink()
    else:
        text.write_text(text.read_text().upper())
        os.utime(text, (1, 1))  # however old it pretends to be
    if damage == "text":
        assert "the calibration text" in quiet_sweep(file).failed["seed=0"]
    runs = counted(monkeypatch)
    assert quiet_sweep(file, overwrite=damage == "text").failed == {}
    assert len(runs) == 1
    after = results(result.folder)
    del before["sweep.json"], after["sweep.json"]  # of the ledger, which tells times
    assert (before == after) == (damage != "text")


@pytest.mark.parametrize("key", ["dataset.name", "evaluation.tasks.names"])
def test_a_change_that_keeps_size_and_time_is_seen(
    written: Write, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    if key == "dataset.name":
        own, changes = tmp_path / "own.txt", {"dataset": {"name": str(tmp_path / "own.txt")}}
        own.write_text((texts / "train.txt").read_text())
    else:
        own = tmp_path / "own.jsonl"
        own.write_text('{"query": "The people of the", "choices": ["United States", "war"], "answer": 0}')
        changes = {"evaluation": {"tasks": {"names": [str(own)]}}}
    cell = load_sweep(written({"calibration.seed": [0]}, **changes)).cells[0]
    cell.config.output_dir.mkdir(parents=True)
    (cell.config.output_dir / "ledger.json").write_text("{}")
    first, times = sweep_record._made_from(cell.config), (own.stat().st_atime_ns, own.stat().st_mtime_ns)
    own.write_text(own.read_text().replace("people", "PEOPLE"))
    os.utime(own, ns=times)
    sweep_record._content.cache_clear()  # what another process has not
    assert sweep_record._made_from(cell.config) != first


def test_weights_that_keep_size_and_time_are_looked_at_again(written: Write, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "own")
    cell = load_sweep(written({"calibration.seed": [0]}, model={"model_id": str(model)})).cells[0]
    cell.config.output_dir.mkdir(parents=True)
    (cell.config.output_dir / "ledger.json").write_text("{}")
    first, file = sweep_record._made_from(cell.config), model / "model.safetensors"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    os.utime(file, ns=times)
    assert sweep_record._made_from(cell.config) != first


# --- failures ---


def test_results_of_an_earlier_call_stay_in_sight_and_are_called_outdated(
    written: Write, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.txt"
    whole = (texts / "train.txt").read_text()
    own.write_text(whole)
    file = written({"calibration.seed": [0]}, dataset={"name": str(own)}, output={"report": True})
    folder = quiet_sweep(file).folder
    tables = [(folder / name).read_text() for name in ("sweep_results.csv", "sweep_results.json")]
    own.write_text(whole.upper())
    failed = quiet_sweep(file)
    assert list(failed.failed) == ["seed=0"]
    assert (folder / "sweep_results.csv").read_text() == "" and failed.rows == []
    assert strict_json(folder / "sweep_results.json") == {"rows": []}
    page = (folder / "report.html").read_text()
    assert "0 of 1 cells are finished" in page and "failed, older results" in page and "Outdated: Perplexity" in page
    own.write_text(whole)  # as it was: nothing has to be made again
    runs = counted(monkeypatch)
    again = quiet_sweep(file)
    assert runs == [] and again.failed == {}
    assert [(folder / name).read_text() for name in ("sweep_results.csv", "sweep_results.json")] == tables
    assert "Outdated" not in (folder / "report.html").read_text()


def test_models_have_tables_of_their_own_and_a_dense_row_each(written: Write, checkpoint: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)
    result = quiet_sweep(written({"model.model_id": [str(checkpoint), str(other)], **SEEDS}))
    grids = [grid for grid in sweep_grids(result.cells) if "Perplexity" in grid.title]
    assert [grid.title.split(": ")[0] for grid in grids] == [str(checkpoint), str(other)]
    for grid in grids:
        assert sum("dense" in line[0].text for line in grid.lines) == 1
        pruned = [line for line in grid.lines if "dense" not in line[0].text]
        assert len(pruned) == 2 and any(cell.best for line in pruned for cell in line)
    with pytest.raises(ArtifactError, match=r"out holds a sweep\. Its own report\.html .* such as .*model_id="):
        read_run(result.folder)


def test_a_failed_cell_does_not_lose_the_others_and_is_tried_again(
    written: Write, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = tmp_path / "late"
    file = written({"model.model_id": [str(late), str(checkpoint)]}, output={"report": True})
    result = quiet_sweep(file)
    (name,) = result.failed
    assert "late" in name and "does not exist" in result.failed[name]
    with pytest.raises(
        SweepError, match=r"1 of 2 cells failed\. .*Called again, the sweep tries only these\."
    ) as caught:
        result.check()
    assert caught.value.failed == result.failed
    assert [bool(cell.run) for cell in result.cells] == [False, True]
    assert f"{name} failed: " in (result.folder / "report.html").read_text()
    make_checkpoint(late, seed=1)
    runs = counted(monkeypatch)
    mended = quiet_sweep(file)
    assert len(runs) == 1
    mended.check()
    assert all(cell.run for cell in mended.cells)


def test_errors_of_other_libraries_are_failures_and_faults_of_the_program_are_not(
    written: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(error: Exception) -> Callable[..., None]:
        def run(config: Any, **_: Any) -> None:
            raise error

        return run

    file = written(SEEDS)
    monkeypatch.setattr(executors, "run", breaks(RuntimeError("CUDA out of memory")))
    assert quiet_sweep(file).failed == dict.fromkeys(("seed=0", "seed=1"), "RuntimeError: CUDA out of memory")
    monkeypatch.setattr(executors, "run", breaks(AttributeError("no such thing")))
    with pytest.raises(AttributeError):
        quiet_sweep(file)


# --- interrupts ---


def test_an_interrupted_sweep_goes_on(written: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = written(SEEDS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, calibrating, "observe_batch", 5)  # the second of three batches of the second cell
        quiet_sweep(file)
    batches = stop_at(monkeypatch, calibrating, "observe_batch", -1)
    runs = counted(monkeypatch)
    result = quiet_sweep(file)
    assert (len(runs), len(batches)) == (1, 2)
    unbroken = quiet_sweep(file, overrides=(f"output.dir={tmp_path / 'unbroken'}",))
    assert result.rows == unbroken.rows


def test_a_cell_that_ended_the_process_does_not_keep_the_others_from_their_turn(
    written: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(SEEDS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, calibrating, "observe_batch", 1)
        quiet_sweep(file)
    order: list[int] = []
    monkeypatch.setattr(executors, "run", lambda config, **_: order.append(config.seed) or quiet_run(config))
    quiet_sweep(file)
    assert order == [1, 0]


# --- checks before any work ---


def test_changed_cells_are_refused_by_name_and_replaced_if_told_so(
    written: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(written(SEEDS))
    other = written(SEEDS, pruning={"ratios": [0.4]})
    runs = counted(monkeypatch)
    with pytest.raises(ConfigError) as caught:
        quiet_sweep(other)
    assert len(caught.value.problems) == 2
    assert "seed=0 holds a run of another configuration (different: pruning.ratios)" in caught.value.problems[0]
    assert runs == []
    assert quiet_sweep(other, overwrite=True).rows[1]["sparsity_asked"] == 0.4
    assert len(runs) == 2


def test_everything_is_checked_before_any_work(written: Write, monkeypatch: pytest.MonkeyPatch, texts: Path) -> None:
    runs = counted(monkeypatch)
    names = [str(texts / "none.txt"), str(texts / "train.txt")]
    with pytest.raises(ConfigError, match=r"cell name=.*: .*none\.txt does not exist"):
        quiet_sweep(written({"dataset.name": names}))
    assert runs == []


def test_a_folder_of_something_else_is_refused(written: Write, tmp_path: Path) -> None:
    file = written(SEEDS)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "experiment_config.yaml").write_text("")
    with pytest.raises(ArtifactError, match=r"holds a single run and no sweep\.json"):
        quiet_sweep(file)
    (folder / "experiment_config.yaml").rename(folder / "novel.txt")
    with pytest.raises(ArtifactError, match=r"holds something else and no sweep\.json.*--overwrite"):
        quiet_sweep(file)
    quiet_sweep(file, overwrite=True)
    quiet_sweep(file)
    assert (folder / "novel.txt").exists()


def test_a_damaged_record_is_named(written: Write) -> None:
    file = written({"calibration.seed": [0]})
    record = quiet_sweep(file).folder / "sweep.json"
    record.write_text("{")
    with pytest.raises(ArtifactError, match=r"sweep\.json.*\. Delete it, and every cell is looked at again"):
        quiet_sweep(file)


def test_dry_run_lists_the_cells(written: Write, checkpoint: Path, tmp_path: Path) -> None:
    def printed(file: Path) -> str:
        text = io.StringIO()
        console = Console(file=text, width=250)
        dry_run_sweep(load_sweep(file), console)
        return text.getvalue()

    file = written(SEEDS)
    shown = printed(file)
    assert "seed=0" in shown and shown.count("new") == 2 and "GiB" in shown
    assert "2 of 2 cells to run (sequential), together about" in shown
    assert ": it fits" in shown and shown.count("memory by stage: ") == 1 and "(the largest):" in shown
    assert not (tmp_path / "out").exists()
    quiet_sweep(file)
    assert "0 of 2 cells to run" in printed(file)
    assert "cells at the same time" not in shown
    other = written({"model.model_id": [str(tmp_path / "none"), str(checkpoint)]}, output={"dir": str(tmp_path / "b")})
    with pytest.raises(ConfigError, match="none does not exist"):
        printed(other)


def test_dry_run_tells_what_would_make_cells_fit(
    written: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "find_spec", lambda name: object())
    large = make_checkpoint(tmp_path / "large", hidden_size=256, intermediate_size=1024, num_hidden_layers=24)
    small = make_checkpoint(tmp_path / "small")
    models = {"small": {"model.model_id": str(small)}, "large": {"model.model_id": str(large)}}
    cells = load_sweep(written({"model": models, **SEEDS, "executor": "ray", "workers": 2}))
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    libraries = dry_run.library_bytes()
    monkeypatch.setattr(dry_run, "library_bytes", lambda: libraries)
    monkeypatch.setattr(switches, "main_memory", lambda: libraries + size)
    text = io.StringIO()
    dry_run_sweep(cells, Console(file=text, width=250))
    shown = text.getvalue()
    assert "\nmodel=large,seed=0, model=large,seed=1:\n  memory by stage: " in shown
    assert shown.count("it does NOT fit") == 1
    assert "--set model.stream=disk would take" in shown
    assert "model=small,seed=0:" not in shown
    assert re.search(r"up to 2 cells at the same time, \d\.\d\d GiB together", shown)
