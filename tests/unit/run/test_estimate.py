"""--dry-run: what would be read, and nothing written."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from ffnscope.errors import ArtifactError, DeviceError, TextError
from ffnscope.run import RunConfig
from ffnscope.run.estimate import estimate, print_estimate
from ffnscope.run.lines import Line
from runs import quiet_run
from tiny import D_FF, LAYERS


def whats(config: RunConfig) -> dict[str, str]:
    return {line.stage: line.what for line in estimate(config).lines}


def test_lines_count_passes_tokens_and_models(small: Callable[..., RunConfig]) -> None:
    config = small(metrics={"scar": {"num_samples": 4}})
    found = estimate(config)
    assert whats(config) == {
        "calibrate": f"1 pass: {6 * 32} tokens forward, {4 * 32} of them backward",
        "score": f"{len(config.metric_names)} metrics x {LAYERS * D_FF} channels of 2 FFNs",
        "plan": "4 plans",
        "evaluate": f"5 models x 128 tokens of {config.evaluation.name}: " + found.lines[3].what.split(": ", 1)[1],
        "samples": "10 texts of up to 3 tokens",
    }
    assert [sorted(names) for names in found.statistics] == [["act_sq", "grad_sq", "taylor_abs", "taylor_sq"]]
    assert found.calibration.disk == found.calibration.sums == 4 * 8 * LAYERS * D_FF
    assert all(line.seconds is None or line.seconds > 0 for line in found.lines)
    assert not config.output_dir.exists()


def test_a_cut_of_the_backward_windows_is_a_second_reading(small: Callable[..., RunConfig]) -> None:
    config = small(metrics={"enabled": ["activation_l2_norm"], "scar": {"num_samples": 4, "max_length": 16}})
    assert whats(config)["calibrate"] == f"1 pass: {4 * 16 + 6 * 32} tokens forward, {4 * 16} of them backward"


def test_weights_need_no_pass(small: Callable[..., RunConfig]) -> None:
    off = {"enabled": False}
    config = small(metrics={"scar": off}, pruning={"algorithms": ["magnitude"]}, evaluation=off)
    assert estimate(config).lines[0] == Line("calibrate", "no pass: every metric reads weights only")
    assert [line.stage for line in estimate(config).lines] == ["calibrate", "score", "plan"]


def test_memory_grows_with_the_batch(small: Callable[..., RunConfig]) -> None:
    peaks = [estimate(small(calibration={"batch_size": size})).peak_bytes for size in (1, 6)]
    assert peaks[0] < peaks[1]


def test_what_would_stop_the_run_stops_the_estimate(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(TextError):
        estimate(small(evaluation={"num_samples": 100_000}))
    quiet_run(small())
    other = small(experiment={"seed": 3})
    with pytest.raises(ArtifactError, match="another configuration"):
        estimate(other)
    assert estimate(other, overwrite=True).lines


def test_device_is_checked(small: Callable[..., RunConfig]) -> None:
    with pytest.raises(DeviceError):
        estimate(small(experiment={"device": "cuda:99"}))


def test_it_is_printed_as_a_table(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    text = io.StringIO()
    config = small(experiment={"name": "a [bold] name"})
    print_estimate(config, Console(file=text, width=200))
    for words in ("a [bold] name: nothing was computed", "1 pass: ", "peak memory about", str(tmp_path / "out")):
        assert words in text.getvalue()


@pytest.mark.usefixtures("two_passes")
def test_a_metric_that_needs_the_core_is_a_second_pass(small: Callable[..., RunConfig]) -> None:
    found = estimate(small(metrics={"enabled": ["supernode_protection_score"]}))
    assert [line.stage for line in found.lines[:2]] == ["calibrate 1", "calibrate 2"]
    assert "taylor_sum" in found.statistics[0]
    assert found.statistics[1] == ["taylor_core"]


def test_a_metric_that_needs_the_core_is_no_second_pass_where_its_sums_fit(small: Callable[..., RunConfig]) -> None:
    found = estimate(small(metrics={"enabled": ["supernode_protection_score"]}))
    assert [line.stage for line in found.lines[:2]] == ["calibrate", "score"]
    assert {"taylor_sum", "taylor_core"} <= set(found.statistics[0])
    assert found.calibration.sums > 8 * LAYERS * D_FF**2 > found.calibration.disk


def test_second_moments_are_announced(small: Callable[..., RunConfig]) -> None:
    found = estimate(small(metrics={"enabled": ["sparsegpt"]}))
    assert found.calibration.disk == found.calibration.sums == 8 * LAYERS * D_FF * (D_FF + 4)
