"""benchmarks/scale.py: results of earlier calls are held to the limit and the settings of this one; the page."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from scripts import load_script

PATH = Path(__file__).parents[2] / "benchmarks" / "scale.py"
pytestmark = pytest.mark.skipif(not PATH.exists(), reason="benchmarks are not part of a source distribution")
MIB = 2**20
ASKED = Namespace(hidden=128, ranks_layers=4, limit_gigabytes=1.0)
TOLD = {"hidden": 128, "layers": 2, "vocabulary": 64, "dtype": "bfloat16", "device": "cuda", "windows": 4, "length": 8}
TOLD |= {"batch": 2, "place": "disk"}


@pytest.fixture(scope="module")
def scale():
    return load_script(PATH)


def stage(peak, **more):
    memory = {"VmHWM": peak * MIB, "RssAnon": MIB, "RssFile": 2 * MIB}
    return {**memory, "seconds": 6.0, "io": 2.0, "flop": 3.0, **more}


def test_a_stage_of_an_earlier_call_is_held_to_the_limit(scale, tmp_path):
    told = tmp_path / "settings.json"
    for name in ("calibrate", "make"):
        for kind in ("record", "result"):
            (tmp_path / f"{name}.{kind}.json").write_text(json.dumps(stage(300)))
    assert scale.run_stage("calibrate", told, tmp_path, 300 * MIB) == stage(300)
    with pytest.raises(scale.StageError, match="calibrate: took 300 MiB, above 299 MiB"):
        scale.run_stage("calibrate", told, tmp_path, 299 * MIB)
    assert scale.run_stage("make", told, tmp_path, 299 * MIB) == stage(300)  # which has no limit


def test_other_layers_of_the_comparison_are_other_settings(scale, tmp_path):
    path = tmp_path / scale.RANKS
    small = scale.ranks_settings(ASKED, TOLD)
    assert (small["hidden"], small["layers"], small["dtype"], small["device"]) == (64, 4, "float32", "cpu")
    scale.check_settings(path, small, "it")
    path.write_text(json.dumps(small))
    scale.check_settings(path, small, "it")
    other = scale.ranks_settings(Namespace(hidden=128, ranks_layers=6), TOLD)
    with pytest.raises(SystemExit, match=r"holds results of other settings .*delete small in it"):
        scale.check_settings(path, other, "small in it")


def test_the_load_is_a_column_where_a_record_has_it(scale):
    found = {"make": {"weights": 2 * 10**9}, "idle": stage(100), "plan": stage(150)}
    *_, plan = scale.table(ASKED, TOLD, found)
    assert plan == "| plan | 150 | 50 | 1 | 2 | 6.0 | 2.0 | 3.0 | 2.0 |"
    lines = scale.table(ASKED, TOLD, {**found, "calibrate": stage(120, load=1.26)})
    head, rule, calibrate, plan = lines[-4:]
    assert head.endswith("| time / bound | load |") and rule.count("|") == head.count("|")
    assert calibrate.endswith("| 2.0 | 1.3 |") and plan.endswith("| 2.0 | not noted |")
    (bound,) = [line for line in lines if line.startswith("The bound")]
    assert "triangular solves in float64" in bound and "load" not in lines[2]
