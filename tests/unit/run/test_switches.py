"""Which option makes it fit, by numbers computed by hand."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ffnscope.ffn.load import ModelSource, stored_bytes
from ffnscope.ffn.streamed import is_streamed
from ffnscope.run import switches
from ffnscope.run.bounds import Load, Processes, Setting, Shapes, Workload, setting_of
from ffnscope.run.switches import COMMAND, FILE, GIB, Bounds, Machine, Need, alternatives, load_to_estimate, need

MEBI = 2**20
# 64 blocks of 1 Mi weights, 1 Mi beside them: 260 MiB in float32
SHAPES = Shapes(65 * MEBI, MEBI, 64, MEBI, 64, 64 * 256, 64)
# 64 windows of 128 tokens, 8 at a time, all backward: a batch keeps 64 MiB, its logits 0.75 MiB
WORK = Workload(Load(8192, 128, 8), Load(8192, 128, 8), sums=MEBI)
STATES = (8192 + 8192 * 65) * 64 * 4  # bytes
HEAD = 4 * MEBI + 512 * 64 * 12


def names(found: list[Need]) -> list[str]:
    return [one.switch for one in found]


def told(ram: int, setting: Setting | None = None) -> list[str]:
    return Bounds(SHAPES, WORK, setting or Setting(4), Machine(ram, None, 10 * MEBI)).advice(COMMAND)


def test_what_the_options_would_take() -> None:
    machine = Machine(GIB, None, 10 * MEBI)
    found = {one.switch: one for one in alternatives(SHAPES, WORK, Setting(4), machine, COMMAND)}
    base = 10 + 1  # libraries and sums, MiB
    logits = 1024 * 64 * 12
    assert need(SHAPES, WORK, Setting(4), machine).device == (base + 260 + 64) * MEBI + logits
    assert found["--batch-size 1"].device == (base + 260 + 8) * MEBI + logits // 8
    assert found["--dtype bfloat16"].device == (base + 130 + 32) * MEBI + logits
    stream = base * MEBI + max(5 * MEBI, HEAD)  # a block with a 64th of what a batch keeps, or the head
    assert (found["--stream cpu"].device, found["--stream cpu"].disk) == (stream + STATES, 0)
    saved = (10 + 2 * 4) * MEBI  # libraries, a block and its pruned copy
    disk = found["--stream disk"]
    assert (disk.stage, disk.device, disk.disk) == ("save", max(stream, saved), STATES)
    assert list(found) == [
        "--batch-size 1",
        "--stream cpu",
        "--stream disk",
        "--stream disk --batch-size 1",
        "--dtype bfloat16",
        "--stream disk --batch-size 1 --dtype bfloat16",
    ]


def test_it_fits() -> None:
    (line,) = told(GIB)
    assert line == "peak memory about 0.33 GiB, in stage calibrate; there are 1.00 GiB of main memory: it fits"


def test_batches_are_enough() -> None:
    first, second, *_ = told(300 * MEBI)
    assert first.endswith("there are 0.29 GiB of main memory: it does NOT fit")
    assert second == "  --batch-size 1 would take 0.27 GiB: fits"


def test_streaming_is_needed() -> None:
    found = told(100 * MEBI)
    assert [line.split(" would")[0].strip() for line in found[1:]] == [
        "--stream disk",
        "--stream disk --batch-size 1",
        "--stream disk --batch-size 1 --dtype bfloat16",
    ]
    assert found[1] == "  --stream disk would take 0.02 GiB, 0.13 GiB on disk meanwhile: fits"


def test_nothing_helps() -> None:
    (line,) = told(12 * MEBI)
    assert "it does NOT fit, and no option would make it fit (the least, --stream disk --batch-size 1 --dtype" in line


def test_memory_that_is_not_known() -> None:
    (line,) = Bounds(SHAPES, WORK, Setting(4), Machine(None)).advice(COMMAND)
    assert line.endswith("how much memory there is could not be found out")


def test_a_streamed_model_is_offered_the_disk_only() -> None:
    machine = Machine(GIB)
    plain = replace(WORK, forward=Load(8192, 128, 1), backward=Load(8192, 128, 1))
    assert names(alternatives(SHAPES, plain, Setting(2, "cpu"), machine, COMMAND)) == ["--stream disk"]
    assert names(alternatives(SHAPES, plain, Setting(2, "disk"), machine, COMMAND)) == []


def test_a_model_that_is_no_list_of_blocks_is_not_offered_streaming() -> None:
    shapes = replace(SHAPES, block=0, blocks=0)
    found = names(alternatives(shapes, WORK, Setting(4), Machine(GIB), FILE))
    assert found == [
        "--set calibration.batch_size=1 --set dataset.batch_size=1",
        "--set model.dtype=bfloat16",
    ]


def test_an_accelerator() -> None:
    shapes, machine = replace(SHAPES, accelerator=True), Machine(GIB, 200 * MEBI, 10 * MEBI)
    found = {one.switch: one for one in alternatives(shapes, WORK, Setting(4), machine, COMMAND)}
    asked = need(shapes, WORK, Setting(4), machine)
    assert not asked.fits(machine) and asked.host == 10 * MEBI
    spread = found["--device-map auto"]  # what the device does not hold is in main memory
    assert spread.device == 200 * MEBI and spread.host == asked.device - 200 * MEBI + 10 * MEBI
    assert spread.fits(machine)
    assert found["--stream cpu"].host == STATES + 10 * MEBI
    assert found["--stream device"].device == (5 + 1) * MEBI + STATES
    assert list(found)[:3] == ["--batch-size 1", "--device-map auto", "--stream device"]
    lines = Bounds(shapes, WORK, Setting(4), machine).advice(COMMAND)
    assert "0.20 GiB of the device's memory and 1.00 GiB of main memory: it does NOT fit" in lines[0]


def test_stages_hold_the_libraries_on_the_cpu_only() -> None:
    for accelerator, expected in ((False, 261 * MEBI), (True, 251 * MEBI)):
        shapes = replace(SHAPES, weights=250 * MEBI // 4, accelerator=accelerator)
        assert Bounds(shapes, WORK, Setting(4), Machine(None, None, 10 * MEBI)).stages["score"].device == expected


class TestLoading:
    def test_weights_that_take_half_of_the_memory_are_not_read(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = ModelSource(str(checkpoint), device="cpu")
        size = stored_bytes(source)
        assert size == sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
        for ram, streamed in ((2 * size, False), (2 * size - 1, True), (None, False)):
            monkeypatch.setattr(switches, "main_memory", lambda ram=ram: ram)
            found = load_to_estimate(source)
            assert is_streamed(found.model) is streamed
            assert found.source == source
            assert setting_of(found) == Setting(4)  # its weights count, though they were not read

    def test_what_was_asked_for_stays(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(switches, "main_memory", lambda: 1)
        asked: dict[str, Any]
        for asked in ({"stream": "cpu"}, {"device_map": "cpu"}):
            device = {} if "device_map" in asked else {"device": "cpu"}
            found = load_to_estimate(ModelSource(str(checkpoint), **asked, **device))
            assert is_streamed(found.model) is ("stream" in asked)

    def test_a_folder_without_safetensors_is_unknown(self, checkpoint: Path, tmp_path: Path) -> None:
        shutil.copytree(checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
        assert stored_bytes(ModelSource(str(tmp_path / "copy"))) is None


def test_several_processes_on_a_machine_that_holds_one() -> None:
    machine = Machine(GIB, None, 10 * MEBI, Processes(4, 4))
    bounds = Bounds(SHAPES, WORK, Setting(4), machine)
    assert bounds.need.device == 4 * (bounds.machine.libraries + (1 + 260 + 64) * MEBI + 1024 * 64 * 12)
    lines = bounds.told(COMMAND)
    assert lines[0].startswith("memory by stage of 4 processes on this machine together: calibrate 1.31 GiB")
    assert any(line.strip().startswith("a single process would take 0.33 GiB: fits") for line in lines)


def test_contextual_sparsity_needs_all_weights_in_memory() -> None:
    machine, work = Machine(GIB, None, 10 * MEBI), replace(WORK, contextual=100 * MEBI)
    asked = need(SHAPES, work, Setting(4), machine)
    assert (asked.stage, asked.device) == ("contextual", (10 + 260 + 100) * MEBI + 1024 * 64 * 12)
    found = names(alternatives(SHAPES, work, Setting(4), machine, COMMAND))
    assert found == ["--batch-size 1", "--dtype bfloat16"]
