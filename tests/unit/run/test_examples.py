"""Every file of examples/ runs on a tiny random model of its architecture; only names, device and sizes differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from checkpoints import make_checkpoint, write_documents
from ffnscope.io import read_stats
from ffnscope.run import RunResult, load_config, load_sweep, run_sweep
from ffnscope.run.progress import Reporter
from runs import quiet_run, strict_json
from tiny import D_FF, LAYERS

EXAMPLES = Path(__file__).parents[3] / "examples"
ARCHITECTURE = {
    "quickstart": "llama",
    "guide": "llama",
    "analysis": "llama",
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
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == {*ARCHITECTURE, "sweep", "contextual"}


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_example_runs(name: str, overrides: Callable[[str], list[str]]) -> None:
    plots = f"output.plots={str(name == 'quickstart').lower()}"
    report = f"output.report={str(name == 'analysis').lower()}"
    fewer = ["ablation.num_samples=2"] if name == "analysis" else []
    lines = [*overrides(ARCHITECTURE[name]), plots, report, *fewer]
    result = quiet_run(load_config(EXAMPLES / f"{name}.yaml", lines))
    check(result)
    model = strict_json(result.folder / "summary.json")["model"]
    assert ARCHITECTURE[name] in model["class"].lower()
    asked = load_config(EXAMPLES / f"{name}.yaml").model.dtype
    assert model["dtype"] == asked


def test_the_sweep_runs(overrides: Callable[[str], list[str]]) -> None:
    sweep = load_sweep(EXAMPLES / "sweep.yaml", [*overrides("llama"), "calibration.num_samples=12"])
    result = run_sweep(sweep, reporter=Reporter(Console(quiet=True)))
    assert result.failed == {}
    methods = [f"method={method},seed={seed}" for method in ("wanda", "activation", "refit") for seed in (0, 1)]
    assert [cell.name for cell in result.cells if cell.run] == [*methods, "algorithms=random"]
    assert len(result.rows) == 7 * 2 * 3  # cells x texts x (dense and two sparsities)
    page = (result.folder / "report.html").read_text()
    assert "Over seeds" in page


def test_contextual_runs(tmp_path: Path) -> None:
    """On texts of several documents."""
    texts = write_documents(tmp_path)
    lines = [
        f"dataset.name={texts / 'train.jsonl'}",
        "dataset.split=null",
        f"evaluation.name={texts / 'test.jsonl'}",
        "evaluation.split=null",
        f"evaluation.extra=[{{name: {texts / 'second.jsonl'}}}]",
        f"model.model_id={make_checkpoint(tmp_path / 'model')}",
        "experiment.device=cpu",
        "calibration.num_samples=12",
        "calibration.max_length=24",
        "contextual.predictor_params={group: 8}",
        "evaluation.num_samples=6",
        "evaluation.max_length=24",
        f"output.dir={tmp_path / 'out'}",
    ]
    result = quiet_run(load_config(EXAMPLES / "contextual.yaml", lines))
    assert result.card is not None and result.card.target == ("recall", 0.95)
    assert [row.label for row in result.card_curve].count("oracle top-k") == 3
    assert "second.jsonl" in result.card.facts["second"]["source"]


def test_the_guide_on_four_layers_takes_the_path_of_every_algorithm(
    overrides: Callable[[str], list[str]], texts: Path, tmp_path: Path
) -> None:
    """The guide's example on 60 lines and a Llama of d_model 64, d_ff 192."""
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4}
    model = make_checkpoint(tmp_path / "four", **shape)
    sentences = (texts / "train.txt").read_text().replace("\n", " ").split(". ")[:60]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in sentences))
    lines = ["calibration.num_samples=60", "calibration.mode=lines", f"dataset.name={tmp_path / 'lines.jsonl'}"]
    lines += [
        f"model.model_id={model}",
        "output.plots=false",
        "output.report=false",
        "evaluation.samples.enabled=false",
    ]
    lines += ["evaluation.extra=[]", "evaluation.num_samples=2"]
    result = quiet_run(load_config(EXAMPLES / "guide.yaml", [*overrides("llama"), *lines]))
    asked = load_config(EXAMPLES / "guide.yaml").pruning
    algorithms = ["magnitude", "wanda", "sparsegpt", "scar_loss_proxy", "supernode_protection_score"]
    assert list(asked.algorithms) == algorithms
    assert [row.label for row in result.rows] == [
        "dense",
        *(f"{metric}-{ratio}" for metric in algorithms for ratio in asked.ratios),
    ]
    names = ("statistics.safetensors", "statistics_core.safetensors")
    first, second = (read_stats(result.folder / name)[0] for name in names)
    assert len(first) == len(second) == 4
    for site, part in first.items():
        assert {"act_sq", "h_outer", "taylor_sq", "taylor_sum"} <= part.values.keys()  # wanda, sparsegpt, loss proxy
        assert part.values["h_outer"].shape == (192, 192)
        assert second[site].values["taylor_core"].shape == (round(0.01 * 192), 192)  # supernode_protection_score
    orders = {name: tuple(result.scores[name].values[site].argsort().tolist()) for name in algorithms}
    assert len(set(orders.values())) == len(algorithms)  # no algorithm stands in for another
    for label, plan in result.plans.items():
        assert set(plan.widths.values()) == {192 - round(192 * plan.budget.sparsity)}, label
        assert all(index.numel() == 2 for index in plan.protected.values())
