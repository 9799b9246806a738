"""Every file of examples/ runs on a tiny random model of its architecture; only names, device and sizes differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints import make_checkpoint
from ffnscope.errors import ConfigError
from ffnscope.run import RunResult, load_config
from ffnscope.run.planned import PLANNED_KEYS, planned_metrics
from runs import quiet_run, strict_json
from tiny import D_FF, LAYERS

EXAMPLES = Path(__file__).parents[3] / "examples"
ARCHITECTURE = {
    "quickstart": "llama",
    "gpt2_fast_test": "gpt2",
    "llama3_8b": "llama",
    "mistral_7b": "mistral",
    "qwen2_7b": "qwen2",
    "olmo2_7b": "olmo2",
}
GUIDE_LINES = {"supernode.halo_fraction": "halo_fraction: 0.10"}
"""Planned key of the guide -> what its line holds; a planned metric's line holds its name."""


@pytest.fixture
def overrides(texts: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """Tiny model, local texts and small sizes, as ``--set`` takes them."""

    def make(arch: str) -> list[str]:
        return [
            f"model.model_id={make_checkpoint(tmp_path / 'model', arch)}",
            "experiment.device=cpu",
            "model.device_map=null",
            f"dataset.name={texts / 'train.txt'}",
            *(f"dataset.{key}=null" for key in ("subset", "split")),
            "calibration.num_samples=4",
            "calibration.max_length=32",
            "metrics.scar.num_samples=2",
            "metrics.scar.max_length=16",
            f"evaluation.name={texts / 'test.txt'}",
            *(f"evaluation.{key}=null" for key in ("subset", "split")),
            "evaluation.num_samples=3",
            "evaluation.max_length=32",
            "evaluation.extra=[{name: pydoc_topics}]",
            "evaluation.samples.max_new_tokens=2",
            f"output.dir={tmp_path / 'out'}",
        ]

    return make


def check(result: RunResult) -> None:
    """The outputs are complete, and the numbers are those of the plans."""
    config = load_config(result.folder / "experiment_config.yaml")
    plans = [(metric, ratio) for metric in config.pruning.algorithms for ratio in config.pruning.ratios]
    assert len(result.plans) == len(plans)
    assert len(result.rows) == 2 * (1 + len(plans))
    for (metric, ratio), plan in zip(plans, result.plans.values(), strict=True):
        assert plan.metric == metric
        assert abs(plan.sparsity - ratio) <= 0.5 / D_FF
        assert len(plan.kept) == LAYERS
    assert set(strict_json(result.folder / "scores.json")["metrics"]) == set(config.metric_names)
    assert list(result.samples) == ["dense", *result.plans]


def test_no_example_is_left_out() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == {*ARCHITECTURE, "guide"}


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_example_runs(name: str, overrides: Callable[[str], list[str]]) -> None:
    plots = f"output.plots={str(name == 'quickstart').lower()}"
    result = quiet_run(load_config(EXAMPLES / f"{name}.yaml", [*overrides(ARCHITECTURE[name]), plots]))
    check(result)
    model = strict_json(result.folder / "summary.json")["model"]
    assert ARCHITECTURE[name] in model["class"].lower()
    asked = load_config(EXAMPLES / f"{name}.yaml").model.dtype
    assert model["dtype"] == asked


def test_guide_runs_but_for_what_a_later_version_brings(overrides: Callable[[str], list[str]], tmp_path: Path) -> None:
    path = EXAMPLES / "guide.yaml"
    rows = path.read_text(encoding="utf-8").splitlines()
    keys = [(GUIDE_LINES[key], f"{key}: ") for key in PLANNED_KEYS if key in GUIDE_LINES]
    missing = [*keys, *((f'"{name}"', f"metric {name!r} is") for name in planned_metrics())]
    later = {n: words for n, row in enumerate(rows, 1) for text, words in missing if text in row and "#" not in row}
    replaced = [*overrides("llama"), "output.plots=false"]
    if later:
        with pytest.raises(ConfigError) as caught:
            load_config(path, replaced)
        assert len(caught.value.problems) == len(later)
        for problem, (line, words) in zip(caught.value.problems, later.items(), strict=True):
            assert problem.startswith(f"line {line}: ")
            assert words in problem
            assert problem.endswith("is not available in this version.")
        path = tmp_path / "guide.yaml"
        path.write_text("\n".join(row for n, row in enumerate(rows, 1) if n not in later), encoding="utf-8")
    check(quiet_run(load_config(path, replaced)))
