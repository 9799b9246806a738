"""Every stage of a run on a model that `device_map` puts in memory and on disk, and on a streamed one."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import write_documents
from ffnscope.errors import NotAvailableError
from ffnscope.io import read_plan, read_scores, read_stats
from ffnscope.run import config_from_dict
from runs import merged, quiet_run, results, small_run
from streams import distance

ANALYSES: dict[str, Any] = {
    "concentration": {"enabled": True},
    "halo": {"enabled": True},
    "cross_layer": {"enabled": True},
    "supernode": {"enabled": True, "top_k": 2, "null_pool": 30, "stability": {"enabled": True, "seeds": [1]}},
    "ablation": {"enabled": True, "num_samples": 2, "draws": 1, "channels": 2},
}
STAGES: dict[str, Any] = {
    "metrics": {"enabled": ["wanda", "obs_loss"]},
    "output": {"checkpoints": True},
}
PRUNINGS: dict[str, Any] = {
    "sequential": {"ratios": [0.5], "algorithms": ["scar_loss_proxy"], "reconstruct": "sequential"},
    "one_shot": {"ratios": [0.5], "algorithms": ["obs_loss"], "reconstruct": "one_shot", "allocator": "global"},
    "measured": {"ratios": [0.5], "algorithms": ["wanda"], "allocator": "measured", "curves": {"num_samples": 2}},
    "rounds": {"ratios": [0.5], "algorithms": ["scar_loss_proxy"], "rounds": 2},
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents"))


def one(checkpoint: Path, documents: Path, out: Path, **changes: Any) -> Path:
    """Make a run on texts of several documents; its folder."""
    names = {"dataset": {"name": str(documents / "train.jsonl")}, "evaluation": {"name": str(documents / "test.jsonl")}}
    asked = merged(small_run(checkpoint, documents, out, **STAGES), merged(names, changes))
    return quiet_run(config_from_dict(asked)).folder


@pytest.mark.filterwarnings("ignore:.*fitted on fewer tokens")
@pytest.mark.parametrize("pruning", sorted(PRUNINGS))
def test_device_map_auto(pruning: str, checkpoint: Path, documents: Path, tmp_path: Path) -> None:
    """Weights on disk are those in memory, and so is every byte that follows from them."""
    blocks = {"pruning": PRUNINGS[pruning], **(ANALYSES if pruning == "sequential" else {})}
    wanted = one(checkpoint, documents, tmp_path / "resident", **blocks)
    places = {"device_map": "auto", "max_memory": {"cpu": "100KB"}, "offload_folder": str(tmp_path / "weights")}
    found = one(checkpoint, documents, tmp_path / "offloaded", model=places, **blocks)
    files = [{k: v for k, v in results(folder).items() if "checkpoints/" not in k} for folder in (wanted, found)]
    assert [name for name in files[0].keys() | files[1].keys() if files[0].get(name) != files[1].get(name)] == []
    tensors = [_tensors(folder / "checkpoints") for folder in (wanted, found)]  # the shards are others
    assert tensors[0].keys() == tensors[1].keys()
    assert len(tensors[0]) > 1
    assert all(torch.equal(tensors[1][name], value) for name, value in tensors[0].items())


@pytest.mark.filterwarnings("ignore:.*fitted on fewer tokens")
@pytest.mark.parametrize("pruning", ["one_shot", "sequential"])
def test_streamed(pruning: str, checkpoint: Path, documents: Path, tmp_path: Path) -> None:
    blocks = {"pruning": PRUNINGS[pruning]}
    wanted = one(checkpoint, documents, tmp_path / "resident", **blocks)
    found = one(checkpoint, documents, tmp_path / "streamed", model={"stream": "cpu"}, **blocks)
    one_, other = (read_stats(folder / "statistics.safetensors")[0] for folder in (wanted, found))
    assert distance(other, one_) <= 1e-5
    metric = PRUNINGS[pruning]["algorithms"][0]
    scores = [read_scores(folder / "scores.safetensors")[0][metric].values for folder in (wanted, found)]
    for site, value in scores[0].items():
        assert (scores[1][site] - value).abs().max() <= 1e-5 * value.abs().max()
    (name,) = (path.name for path in (wanted / "plans").glob("*.json"))
    kept = [read_plan(folder / "plans" / name).kept for folder in (wanted, found)]
    assert all(kept[1][site].equal(index) for site, index in kept[0].items())
    rows = [_numbers(folder / "pruning_results.csv") for folder in (wanted, found)]
    assert len(rows[0]) > 4
    assert rows[1] == pytest.approx(rows[0], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("model", [{"stream": "cpu"}, {"device_map": "auto", "max_memory": {"cpu": "100KB"}}])
def test_contextual_sparsity_is_refused_before_any_work(
    model: dict[str, Any], checkpoint: Path, documents: Path, tmp_path: Path
) -> None:
    contextual = {"enabled": True, "target": "density=0.5", "predictor_params": {"group": 8}, "policy": "top_k"}
    with pytest.raises(NotAvailableError, match=r"on weights in memory, and .*llama has them elsewhere"):
        one(checkpoint, documents, tmp_path / "out", model=model, contextual=contextual)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.rglob("model*.safetensors") for name, value in load_file(path).items()}


def _numbers(path: Path) -> list[float]:
    """Perplexity and KL of all rows, dense and pruned."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [float(row[key]) for row in rows for key in sorted(row) if row[key] and key.startswith(("perplexity", "kl"))]
