"""Memory per stage, by numbers computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ffnscope.analyze.curves import CurveOptions
from ffnscope.analyze.measured import CurveRounds
from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.ffn.load import ModelSource, load_model
from ffnscope.ffn.sites import find_sites
from ffnscope.run.bounds import (
    Bytes,
    Load,
    Processes,
    Setting,
    Shapes,
    Workload,
    all_stage_bytes,
    curve_bytes,
    load_of_text,
    setting_of,
    shapes_of,
    stage_bytes,
)
from tiny import D_FF, HIDDEN, LAYERS, VOCAB, tiny, tokens

# 10 blocks of 100, 500 beside them; d_model 4, 30 values per token kept for a backward, vocabulary 50
SHAPES = Shapes(1500, 100, 10, 500, 4, 30, 50)
# 20 windows of 8 tokens calibrate, 4 at a time, 10 of them backward; 6 windows evaluate, 2 at a time
WORK = Workload(Load(160, 8, 4), Load(80, 8, 4), Load(48, 8, 2), sums=1000, refit_states=2 * 160 * 4, refit=700)


def test_a_resident_model() -> None:
    assert stage_bytes(SHAPES, WORK, Setting(4)) == {
        "calibrate": Bytes(6000 + 32 * (30 * 4 + 12 * 50) + 1000),
        "score": Bytes(7000),
        "reconstruct": Bytes(6000 + 1280 * 4 + 700),
        "evaluate": Bytes(6000 + 16 * 2 * 4 * 50),
        "save": Bytes(6000),
    }


def test_a_model_that_is_loaded_again_to_be_cut() -> None:
    again = replace(WORK, reloads=True)
    assert stage_bytes(SHAPES, again, Setting(4))["save"] == Bytes(12000)
    assert stage_bytes(replace(SHAPES, accelerator=True), again, Setting(4))["save"] == Bytes(6000, host=6000)
    assert stage_bytes(SHAPES, again, Setting(4, "disk"))["save"] == Bytes(4000)


def test_a_streamed_model() -> None:
    head = 500 * 4 + 512 * 50 * 12  # 512 tokens at a time
    states = (160 + 80 * 11) * 4 * 4  # all windows once, those that run backward at every block and after it
    assert stage_bytes(SHAPES, WORK, Setting(4, "disk")) == {
        "calibrate": Bytes(head + 1000, disk=states),
        "score": Bytes(2000 + 1000),
        "reconstruct": Bytes(2 * 2000 + 700, disk=1280 * 4),
        "evaluate": Bytes(head, disk=3 * 48 * 16),
        "save": Bytes(4000),
    }


@pytest.mark.parametrize(("place", "accelerator", "where"), [("cpu", True, "host"), ("cpu", False, "device")])
def test_where_hidden_states_wait(place: str, accelerator: bool, where: str) -> None:
    shapes = replace(SHAPES, accelerator=accelerator)
    on_disk = stage_bytes(shapes, WORK, Setting(4, "disk"))
    found = stage_bytes(shapes, WORK, Setting(4, place))  # pyright: ignore[reportArgumentType]
    for stage, size in found.items():
        assert getattr(size, where) == on_disk[stage].disk + (on_disk[stage].device if where == "device" else 0)
        assert size.disk == 0


def test_a_block_counts_where_it_is_larger_than_the_head() -> None:
    large = replace(SHAPES, block=10**6, weights=10**7 + 500)
    found = stage_bytes(large, WORK, Setting(2, "disk"))
    assert found["calibrate"].device == 2 * 10**6 + 32 * 30 * 2 // 10 + 1000
    assert found["reconstruct"].device == 4 * 10**6 + 700


def test_smaller_batches_and_a_shorter_dtype() -> None:
    found = stage_bytes(SHAPES, WORK, Setting(2, batch=1))
    assert found["calibrate"].device == 3000 + 8 * (30 * 2 + 600) + 1000
    assert found["evaluate"].device == 3000 + 8 * 2 * 2 * 50
    assert stage_bytes(SHAPES, WORK, Setting(4, batch=100)) == stage_bytes(SHAPES, WORK, Setting(4))


def test_stages_that_are_not_asked_for_are_left_out() -> None:
    assert set(stage_bytes(SHAPES, Workload(), Setting(4))) == {"score", "save"}
    assert stage_bytes(SHAPES, Workload(more=11), Setting(4, "cpu"))["save"].device == 4000 + 11


def test_curves_hold_logits_hidden_states_and_columns() -> None:
    work = Workload(curves=Load(40, 8, 3), columns=77)
    blocks, logits = SHAPES.blocks * SHAPES.d_model * 4, 2 * 4 * SHAPES.vocabulary
    for batch, tokens_at_once in ((None, 24), (1, 8)):
        found = stage_bytes(SHAPES, work, Setting(4, batch=batch))["curves"]
        assert found.device == SHAPES.weights * 4 + tokens_at_once * (blocks + logits) + 77
    streamed = stage_bytes(SHAPES, work, Setting(4, "disk"))["curves"].device
    graph = SHAPES.saved * 4 // SHAPES.blocks
    assert streamed == max(SHAPES.block, SHAPES.outside) * 4 + 24 * (graph + blocks + logits) + 77


def test_tasks_have_batches_of_their_own_and_leave_no_states() -> None:
    work = Workload(tasks=Load(10**6, 8, 3))
    logits = 2 * 4 * SHAPES.vocabulary
    assert stage_bytes(SHAPES, work, Setting(4, batch=1))["evaluate"].device == SHAPES.weights * 4 + 24 * logits
    assert stage_bytes(SHAPES, work, Setting(4, "disk"))["evaluate"].disk == 0


def test_stages_of_one_command_alone() -> None:
    work = Workload(Load(8, 8, 1), contextual=5, only=("contextual",))
    assert set(stage_bytes(SHAPES, work, Setting(4))) == {"contextual"}


def test_bytes_of_curves() -> None:
    model = tiny("llama")
    sites, windows = find_sites(model), contiguous_windows(tokens(4, 8), "random")
    rounds = CurveRounds(1, 4, CurveOptions((0.5, 0.25), 2))
    text, columns = curve_bytes(model, sites, rounds, windows, 100)
    assert text == Load(32, 8, 2)
    assert columns == 100 + 4 * LAYERS * HIDDEN * D_FF + 4 * 8 * (D_FF**2 + HIDDEN * D_FF)
    assert curve_bytes(model, sites, rounds, windows, 0)[1] == 0


def test_the_largest_text_counts() -> None:
    texts = [contiguous_windows(tokens(n, 8), "random") for n in (3, 5)]
    assert load_of_text(texts, 2) == Load(40, 8, 2)
    assert load_of_text([], 2) == Load()
    assert Load(40, 8, 100).at_once(None) == 40


def test_shapes_of_a_tiny_model() -> None:
    model = tiny("llama")
    block = 2 * HIDDEN**2 + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * D_FF + 2 * HIDDEN
    outside = 2 * VOCAB * HIDDEN + HIDDEN
    saved = LAYERS * (4 * D_FF + 12 * HIDDEN)
    expected = Shapes(LAYERS * block + outside, block, LAYERS, outside, HIDDEN, saved, VOCAB)
    assert shapes_of(model, find_sites(model)) == expected


def test_shapes_do_not_depend_on_streaming(checkpoint: Path) -> None:
    found = [load_model(ModelSource(str(checkpoint), device="cpu", stream=place)) for place in (None, "disk")]
    shapes = [shapes_of(one.model, find_sites(one.model)) for one in found]
    assert shapes[0] == shapes[1]
    assert [setting_of(one) for one in found] == [Setting(4), Setting(4, "disk")]


def test_processes_on_one_machine_share_the_text_and_each_hold_the_model() -> None:
    three = Processes(3, 3)
    found, one = (all_stage_bytes(SHAPES, WORK, Setting(4), processes) for processes in (three, Processes()))
    assert one == stage_bytes(SHAPES, WORK, Setting(4))
    assert found["calibrate"] == Bytes(3 * (6000 + 27 * (30 * 4 + 12 * 50) + 1000))  # 80 tokens in three parts
    assert found["reconstruct"] == Bytes(one["reconstruct"].device + 2 * 6000)
    states = (54 + 27 * 11) * 4 * 4
    streamed = all_stage_bytes(SHAPES, WORK, Setting(4, "disk"), three)
    assert streamed["calibrate"] == Bytes(3 * (500 * 4 + 512 * 50 * 12 + 1000), disk=3 * states)
    assert streamed["save"] == Bytes(4000)  # the others wait, and hold no weights


def test_processes_with_a_device_each_share_main_memory() -> None:
    shapes, setting = replace(SHAPES, accelerator=True), Setting(4, "cpu")
    one, two = (all_stage_bytes(shapes, WORK, setting, p)["calibrate"] for p in (Processes(2, 1), Processes(2, 2, 1)))
    assert (two.device, two.host) == (one.device, 2 * one.host)


def test_weights_that_a_device_map_leaves_elsewhere() -> None:
    setting = Setting(4, elsewhere=900, beside=600)
    found = stage_bytes(replace(SHAPES, accelerator=True), WORK, setting)
    assert found["score"] == Bytes(6000 - 800 * 4 + 1000, host=2400)  # a block of 100 is brought
    assert stage_bytes(SHAPES, WORK, Setting(4, elsewhere=900))["score"] == Bytes(6000 - 800 * 4 + 1000)


def test_places_are_read_from_the_model(checkpoint: Path, tmp_path: Path) -> None:
    places = {"device_map": "auto", "max_memory": {"cpu": "40KB"}, "offload_folder": str(tmp_path)}
    loaded = load_model(ModelSource(str(checkpoint), **places))
    away = sum(p.numel() for p in loaded.model.parameters() if p.device.type == "meta")
    assert away and setting_of(loaded) == Setting(4, elsewhere=away, beside=0)
