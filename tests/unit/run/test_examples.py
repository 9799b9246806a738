"""Every file of examples/ runs on a tiny random model of its architecture; only names, device and sizes differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints import make_checkpoint
from ffnscope.run import RunResult, load_config
from runs import quiet_run, strict_json
from tiny import D_FF, LAYERS

EXAMPLES = Path(__file__).parents[3] / "examples"
ARCHITECTURE = {
    "quickstart": "llama",
    "guide": "llama",
    "gpt2_fast_test": "gpt2",
    "llama3_8b": "llama",
    "mistral_7b": "mistral",
    "qwen2_7b": "qwen2",
    "olmo2_7b": "olmo2",
}


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
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == {*ARCHITECTURE}


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_example_runs(name: str, overrides: Callable[[str], list[str]]) -> None:
    plots = f"output.plots={str(name == 'quickstart').lower()}"
    result = quiet_run(load_config(EXAMPLES / f"{name}.yaml", [*overrides(ARCHITECTURE[name]), plots]))
    check(result)
    model = strict_json(result.folder / "summary.json")["model"]
    assert ARCHITECTURE[name] in model["class"].lower()
    asked = load_config(EXAMPLES / f"{name}.yaml").model.dtype
    assert model["dtype"] == asked
