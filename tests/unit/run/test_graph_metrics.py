"""Graph scorers as algorithms of a run, with their parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch

import ffnscope
from ffnscope.io import read_scores
from ffnscope.run import RunConfig
from runs import quiet_run

NAMES = ["weighted_pagerank", "weighted_pagerank_chained", "layerwise_modified_pagerank_chained", "write_norm"]


def test_algorithms_with_parameters(small: Callable[..., RunConfig]) -> None:
    config = small(
        pruning={"algorithms": NAMES, "ratios": [0.25]},
        metrics={
            "scar": {"enabled": False},
            "weighted_pagerank": {"gamma": 0.0},
            "weighted_pagerank_chained": {"gamma": 0.25, "theta": 1.0},
            "layerwise_modified_pagerank_chained": {"z_importance": True, "sparsity": 0.5},
        },
    )
    result = quiet_run(config)
    scores = read_scores(result.folder / "scores.safetensors")[0]
    assert list(scores) == NAMES
    assert scores["weighted_pagerank_chained"].facts["params"] == {"gamma": 0.25, "theta": 1.0}
    assert scores["layerwise_modified_pagerank_chained"].facts["params"] == {"z_importance": True, "sparsity": 0.5}
    for site, value in scores["write_norm"].values.items():
        assert torch.allclose(scores["weighted_pagerank"].values[site], value, rtol=1e-5)
    plans = {path.stem for path in (result.folder / "plans").glob("*.json")}
    assert plans == {f"{name}-0.25" for name in NAMES}
    assert ffnscope.read_plan(result.folder / "plans" / "weighted_pagerank-0.25.json").sparsity == 0.25
