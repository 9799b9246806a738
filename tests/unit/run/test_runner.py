"""A run from end to end on a tiny checkpoint: what it writes, and what other texts, sites and sizes do to it."""

from __future__ import annotations

import csv
import json
import platform
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from matplotlib import image

import ffnscope
from ffnscope.errors import UsageError
from ffnscope.io import read_plan, read_scores, read_stats, read_tensors
from ffnscope.registry import METRICS
from ffnscope.run import RunResult, config_from_dict, load_config
from runs import quiet_run, results, small_run, strict_json
from tiny import D_FF, HIDDEN, LAYERS

LABELS = ["random-0.25", "random-0.5", "scar_loss_proxy-0.25", "scar_loss_proxy-0.5"]
SCAR = [name for name in METRICS.names() if name.startswith("scar_")]
NAMES = ["random", "scar_loss_proxy", "activation_outlier_index", *(n for n in SCAR if n != "scar_loss_proxy")]
SITES = [f"model.layers.{i}.mlp" for i in range(LAYERS)]


@pytest.fixture(scope="module")
def full(checkpoint: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """One run of a YAML file with everything switched on."""
    folder = tmp_path_factory.mktemp("full")
    blocks = small_run(
        checkpoint,
        texts,
        folder / "out",
        experiment={"name": "full"},
        metrics={"enabled": ["activation_outlier_index"], "scar": {"num_samples": 4, "max_length": 16}},
        supernode={"enabled": True, "top_k": 3},
        evaluation={"extra": [{"name": "pydoc_topics"}]},
        output={"plots": True},
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(blocks))
    return quiet_run(load_config(folder / "run.yaml"))


# --- what a run writes ---


def test_every_output_is_there(full: RunResult) -> None:
    found = {path.relative_to(full.folder).as_posix() for path in full.folder.rglob("*") if path.is_file()}
    plots = ["heatmap", "perplexity", "rank_correlation", *(f"scores_{name}" for name in NAMES)]
    assert found == {
        "experiment_config.yaml",
        "ledger.json",
        "run.log",
        "statistics.safetensors",
        "scores.safetensors",
        "scores.json",
        "pruning_results.json",
        "pruning_results.csv",
        "results.md",
        "samples.json",
        "summary.json",
        "analysis/core_overlap.csv",
        "analysis/core_overlap.json",
        "analysis/channel_sets.safetensors",
        "evaluation/windows_0.json",
        "evaluation/windows_1.json",
        *(f"plans/{label}.json" for label in LABELS),
        *(f"plots/{name}.png" for name in plots),
    }


def test_the_resolved_configuration_is_accepted_back_and_equal(full: RunResult) -> None:
    written = full.folder / "experiment_config.yaml"
    config = load_config(written)
    assert config == load_config(full.folder.parent / "run.yaml")
    assert config.metrics.scar.max_length == 16
    assert yaml.safe_load(written.read_text())["evaluation"]["max_length"] == 32


def test_scores_hold_every_channel_of_every_metric(full: RunResult) -> None:
    found, facts = read_scores(full.folder / "scores.safetensors")
    assert list(found) == list(full.scores) == NAMES
    for one in found.values():
        assert [site.name for site in one.values] == SITES
        assert all(value.shape == (D_FF,) for value in one.values.values())
    assert facts["calibration"]["predicted_tokens"] == 6 * 31
    assert (facts["gradient_windows"], facts["gradient_length"]) == (4, 16)
    assert found["random"].facts["params"] == {"seed": 42}  # the experiment's


def test_summaries_of_scores(full: RunResult) -> None:
    value = strict_json(full.folder / "scores.json")
    assert list(value["metrics"]) == NAMES
    site, natural = next(iter(full.scores["scar_loss_proxy"].values.items()))
    row = value["metrics"]["scar_loss_proxy"]["sites"][site.name]
    assert row["mean"] == pytest.approx(float(natural.mean()))
    assert row["std"] == pytest.approx(float(natural.std(correction=0)))
    assert (row["min"], row["max"]) == (float(natural.min()), float(natural.max()))
    assert row["quantiles"]["0.5"] == pytest.approx(float(natural.quantile(0.5)))
    assert len(value["rank_correlation"]["mean"]) == len(NAMES)


def test_statistics_count_the_windows_that_ran_backward(full: RunResult) -> None:
    stats, facts = read_stats(full.folder / "statistics.safetensors")
    assert [site.name for site in stats] == SITES
    for part in stats.values():
        assert (part.counts["act_sq"], part.counts["act_hist"]) == (6 * 32, 6)  # each 32nd token
        assert part.counts["taylor_abs"] == part.counts["grad_sq"] == 4 * 15  # four windows, cut to 16 tokens
    assert (facts["gradient_windows"], facts["gradient_length"]) == (4, 16)


def test_plans_are_exact_and_protect_the_core(full: RunResult) -> None:
    assert list(full.plans) == LABELS
    for label, plan in full.plans.items():
        same = read_plan(full.folder / "plans" / f"{label}.json")
        assert same.widths == plan.widths
        assert set(plan.widths.values()) == {D_FF * 3 // 4 if label.endswith("0.25") else D_FF // 2}
        for site, core in plan.protected.items():
            top = torch.sort(full.scores["scar_loss_proxy"].values[site], descending=True, stable=True).indices[:3]
            assert core.tolist() == sorted(top.tolist())
            assert set(core.tolist()) <= set(plan.kept[site].tolist())


def test_tables_of_results(full: RunResult) -> None:
    rows = strict_json(full.folder / "pruning_results.json")["rows"]
    assert [row["label"] for row in rows] == 2 * ["dense", *LABELS]
    assert len({row["dataset"] for row in rows}) == 2
    assert all(row["n_tokens"] == 4 * 31 and row["perplexity"] > 1 for row in rows)
    assert all(row["kl_to_dense"] > 0 and 0 <= row["top1_agreement"] <= 1 for row in rows if row["metric"])
    with (full.folder / "pruning_results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [list(row) for row in table] == [list(row) for row in rows]
    assert [float(row["perplexity"]) for row in table] == [row["perplexity"] for row in rows]
    text = (full.folder / "results.md").read_text()
    assert text.startswith("# full\n")
    assert "| dense |" in text
    assert "random (floor)" in text


def test_samples_are_texts_of_every_model(full: RunResult) -> None:
    value = strict_json(full.folder / "samples.json")
    assert list(value["texts"]) == ["dense", *LABELS]
    assert all(len(texts) == 2 for texts in full.samples.values())


def test_plots_are_pictures(full: RunResult) -> None:
    files = sorted((full.folder / "plots").iterdir())
    assert len(files) == 3 + len(NAMES)
    for file in files:
        height, width, channels = image.imread(file).shape
        assert height > 200
        assert width > 300
        assert channels == 4


def test_summary_says_what_was_done_with_what(full: RunResult, checkpoint: Path) -> None:
    value = strict_json(full.folder / "summary.json")
    assert value["versions"] == {
        "ffnscope": ffnscope.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    model = value["model"]
    assert (model["model_id"], model["class"], model["dtype"]) == (str(checkpoint), "LlamaForCausalLM", "float32")
    assert model["weights_hash"] == read_scores(full.folder / "scores.safetensors")[1]["model"]
    assert model["ffn_parameters_per_channel"] == 3 * HIDDEN
    assert [site["path"] for site in model["sites"]] == SITES
    assert list(value["texts"]) == ["calibration", "evaluation_0", "evaluation_1"]
    assert len({text["hash"] for text in value["texts"].values()}) == 3
    assert value["seeds"] == {"experiment": 42, "calibration": 42}
    analyses = ["core overlap", "channel sets"]
    stages = ["calibrate", "score", *analyses, "plan", "evaluate 1", "evaluate 2", "samples", "report"]
    assert list(value["stages"]) == stages
    for row in value["stages"].values():
        assert row["seconds"] >= 0
        assert row["peak_memory_bytes"]["resident"] > 2**20
    assert value["plans"]["random-0.5"] == {"sparsity": 0.5, "metric": "random"}
    assert value["results"] == strict_json(full.folder / "pruning_results.json")["rows"]


def test_log_tells_the_stages(full: RunResult) -> None:
    text = (full.folder / "run.log").read_text()
    for words in ("calibrate: started", "evaluate on", "generate samples", "plots", f"results in {full.folder}"):
        assert words in text


def test_ledger_knows_the_bytes_of_every_result(full: RunResult) -> None:
    rows = strict_json(full.folder / "ledger.json")["stages"].values()
    known = {name: digest for row in rows for name, digest in row["files"].items()}
    assert known == results(full.folder)


# --- other texts, sites and sizes ---


def test_python_and_yaml_give_the_same(full: RunResult, tmp_path: Path) -> None:
    blocks = yaml.safe_load((full.folder / "experiment_config.yaml").read_text())
    output = {"dir": str(tmp_path / "again"), "plots": False, "report": False}
    again = quiet_run(config_from_dict({**blocks, "output": output}))
    assert results(again.folder).items() <= results(full.folder).items()
    assert again.rows == full.rows


def test_tracked_layers(small) -> None:
    found = quiet_run(small(model={"tracked_layers": ["model.model.layers.[1-1].mlp.up_proj"]}))
    assert {site.name for one in found.scores.values() for site in one.values} == {SITES[1]}
    assert all(plan.sparsity in (0.25, 0.5) and len(plan.kept) == 1 for plan in found.plans.values())
    with pytest.raises(UsageError, match=r"pattern 'layers\.9\.mlp' matches no FFN"):
        quiet_run(small(model={"tracked_layers": ["layers.9.mlp"]}), overwrite=True)


def test_supernode_may_be_left_unprotected(small) -> None:
    found = quiet_run(small(supernode={"enabled": True, "core_fraction": 0.1, "protect_core": False}))
    assert not any(plan.protected for plan in found.plans.values())


def test_global_allocator_gives_unequal_widths(small) -> None:
    found = quiet_run(small(pruning={"allocator": "global", "algorithms": ["scar_loss_proxy"]}))
    for label, plan in found.plans.items():
        assert plan.sparsity == pytest.approx(float(label.rsplit("-", 1)[1]))
        assert len(set(plan.widths.values())) == LAYERS
    assert len(found.rows) == 3


def test_widths_are_multiples(small) -> None:
    found = quiet_run(small(pruning={"multiple_of": 16, "ratios": [0.3]}))
    assert {width for plan in found.plans.values() for width in plan.widths.values()} == {32}


def test_lines_mode_pads_and_counts_no_pads(small, tmp_path: Path) -> None:
    lines = [f"Line {i} " + "of many words " * (i % 3) for i in range(12)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    found = quiet_run(small(dataset={"name": str(tmp_path / "lines.txt")}, calibration={"mode": "lines"}))
    facts = strict_json(found.folder / "summary.json")["texts"]
    assert facts["calibration"]["windows"] == 6
    assert facts["calibration"]["tokens"] < 6 * facts["calibration"]["length"]
    assert facts["evaluation_0"]["tokens"] == 4 * 32  # the held-out text is cut into blocks


def test_chats_with_the_loss_on_answers_only(small, texts: Path, tmp_path: Path) -> None:
    def write(name: str, topic: str) -> str:
        rows = [
            [{"role": "user", "content": f"{topic} {i}?"}, {"role": "assistant", "content": f"Yes, {topic} {i}."}]
            for i in range(8)
        ]
        (tmp_path / name).write_text("\n".join(json.dumps({"messages": row}) for row in rows))
        return str(tmp_path / name)

    found = quiet_run(
        small(
            dataset={"name": write("train.jsonl", "peace")},
            calibration={"mode": "chat", "answers_only": True, "max_length": 64},
            evaluation={"name": write("test.jsonl", "trade"), "extra": [{"name": str(texts / "test.txt")}]},
        )
    )
    facts = strict_json(found.folder / "summary.json")["texts"]
    for name in ("calibration", "evaluation_0"):
        assert 0 < facts[name]["predicted_tokens"] < facts[name]["tokens"] - facts[name]["windows"]
    assert facts["evaluation_1"]["predicted_tokens"] == 4 * 63  # a plain text beside the chats: all of it counts


def test_calibration_seed_leaves_the_held_out_text_as_it_is(small) -> None:
    hashes = []
    for seed in (1, 2):
        found = quiet_run(small(calibration={"seed": seed}), overwrite=True)
        hashes.append({name: text["hash"] for name, text in _texts(found).items()})
    assert hashes[0]["calibration"] != hashes[1]["calibration"]
    assert hashes[0]["evaluation_0"] == hashes[1]["evaluation_0"]


def _texts(found: RunResult) -> dict[str, dict[str, str]]:
    return strict_json(found.folder / "summary.json")["texts"]


def test_only_weights_are_read_for_metrics_of_weights(small) -> None:
    found = quiet_run(
        small(
            metrics={"scar": {"enabled": False}, "random": {"seed": 7}},
            pruning={"algorithms": ["weight_magnitude", "random"]},
        )
    )
    assert read_tensors(found.folder / "statistics.safetensors")[0] == {}
    assert found.scores["random"].facts["params"] == {"seed": 7}
    assert len(found.rows) == 5


def test_analysis_without_pruning_or_evaluation(small) -> None:
    found = quiet_run(small(pruning={"enabled": False}, evaluation={"enabled": False}, output={"plots": True}))
    assert (found.plans, found.rows, found.samples) == ({}, [], {})
    names = {path.name for path in found.folder.iterdir()}
    assert names.isdisjoint({"plans", "evaluation", "pruning_results.json", "samples.json"})
    assert (found.folder / "plots" / "heatmap.png").is_file()


def test_dense_evaluation_alone(small) -> None:
    off = {"enabled": False}
    found = quiet_run(small(pruning=off, metrics={"scar": off}, evaluation={"samples": off}, output={"plots": True}))
    assert [row.label for row in found.rows] == ["dense"]
    assert found.scores == {}
    assert not (found.folder / "plots").exists()


def test_sparsities_that_print_alike_are_kept_apart(small) -> None:
    found = quiet_run(small(pruning={"ratios": [0.12345671, 0.12345672, 0], "algorithms": ["random"]}))
    assert list(found.plans) == ["random-0.12345671", "random-0.12345672", "random-0"]
    assert found.rows[3].results[1].value == 0.0  # nothing removed: no KL to the dense model


def test_half_precision(small) -> None:
    found = quiet_run(small(model={"dtype": "bfloat16"}))
    assert strict_json(found.folder / "summary.json")["model"]["dtype"] == "bfloat16"
    assert all(value.dtype == torch.float64 for one in found.scores.values() for value in one.values.values())


def test_results_do_not_depend_on_batch_sizes(small, tmp_path: Path) -> None:
    one, two = (
        quiet_run(
            small(
                calibration={"batch_size": size},
                dataset={"batch_size": size},
                output={"dir": str(tmp_path / f"batch_{size}")},
            )
        )
        for size in (1, 4)
    )
    for name, scores in one.scores.items():
        for site, value in scores.values.items():
            assert torch.allclose(value, two.scores[name].values[site], rtol=1e-4, atol=1e-6)
    assert [row.results[0].value for row in one.rows] == pytest.approx([row.results[0].value for row in two.rows])
