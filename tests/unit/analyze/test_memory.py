"""What a calibration is said to take before it starts."""

from __future__ import annotations

from typing import Any

import torch

from allocations import peak_bytes
from ffnscope.analyze.levels import CoreRule, calibrate_all
from ffnscope.analyze.memory import CalibrationBytes, calibration_bytes
from ffnscope.calibrate.collect import PassOptions
from ffnscope.ffn.sites import find_sites
from ffnscope.types import ChannelStats
from reference import text
from tiny import D_FF, HIDDEN, LAYERS, tiny

CORE = {"supernode_protection_score": {}}
VECTORS = LAYERS * 8 * D_FF  # one per site
RULE = CoreRule(count=3)


def asked(model: Any, metrics: Any, **options: Any) -> CalibrationBytes:
    given: Any = {"sites": find_sites(model), "rule": RULE, "options": PassOptions(batch_size=2, **options)}
    return calibration_bytes(model, text(5), metrics, **given)


def test_sums_held_activations_and_files() -> None:
    model = tiny("llama")
    held = 2 * 16 * 4 * D_FF  # two windows of 16 tokens, of all sites but the first
    assert asked(model, {"wanda": {}}) == CalibrationBytes(VECTORS, VECTORS, VECTORS)
    assert asked(model, {"scar_taylor": {}}) == CalibrationBytes(VECTORS + held, VECTORS, VECTORS)
    assert asked(tiny("llama", dtype=torch.bfloat16), {"scar_taylor": {}}).memory == VECTORS + held // 2
    assert asked(model, {"scar_taylor": {}}, gradient_length=8).memory == VECTORS + held // 2
    assert asked(model, {"random": {}}) == CalibrationBytes(0, 0, 0)
    outer = LAYERS * 8 * (HIDDEN * HIDDEN + HIDDEN)
    assert asked(model, {"rayleigh_quotient": {}}) == CalibrationBytes(outer, outer, outer)


def test_one_pass_takes_more_memory_and_as_much_disk_as_two() -> None:
    """The sums of both passes are there at the end of the second."""
    model = tiny("llama")
    one, two = (asked(model, CORE, **options) for options in ({}, {"one_pass_bytes": 0}))
    assert one.disk == two.disk == two.sums == VECTORS * (2 + 3)
    assert one.sums == VECTORS * (2 + D_FF)
    assert one.memory - one.sums == two.memory - two.sums > 0
    assert one.beside_batches == one.sums
    assert two.beside_batches == 2 * two.disk


def test_the_rule_of_the_core_counts() -> None:
    model = tiny("llama")
    rules = (RULE, CoreRule("wanda", count=3))
    first, second = (
        calibration_bytes(model, text(5), CORE, sites=find_sites(model), rule=rule, options=PassOptions())
        for rule in rules
    )
    assert second.disk - first.disk == VECTORS  # act_sq


def test_what_is_said_is_what_a_calibration_takes() -> None:
    """Weights and batches of a pass without sums come off, as in the passes of calibrate/test_memory.py."""
    model = tiny("llama", num_hidden_layers=4, intermediate_size=200)
    sites, windows = find_sites(model), text(4, 32)
    options = PassOptions(batch_size=2)
    kept: dict[str, dict[Any, ChannelStats]] = {}

    def run(metrics: Any) -> None:
        kept["stats"], _ = calibrate_all(model, windows, metrics, sites=sites, options=options, rule=RULE)

    peaks = [peak_bytes(lambda m=m: run(m)) for m in ({"scar_taylor": {}}, {**CORE, "average_redundancy": {}})]
    said = [
        calibration_bytes(model, windows, m, sites=sites, rule=RULE, options=options).memory
        for m in ({"scar_taylor": {}}, {**CORE, "average_redundancy": {}})
    ]
    growth = said[1] - said[0]
    assert growth > 2 * 4 * 8 * 200 * 200
    assert 0 <= peaks[1] - peaks[0] - growth < 2 * 8 * 200 * 200  # temporaries of one FFN are not counted


def test_words() -> None:
    text = CalibrationBytes(3 * 2**30, 2**31, 2**20).told
    assert (
        text
        == "calibration needs 3,072 MiB beside the model and its batches, 2,048 MiB of them for sums; 1 MiB on disk"
    )
