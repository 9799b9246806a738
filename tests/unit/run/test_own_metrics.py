"""Metrics of the user's own module, and a second text, from YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import ffnscope as fs
from ffnscope.errors import ArtifactError, ConfigError
from ffnscope.io import read_scores, read_stats
from ffnscope.registry import METRICS
from ffnscope.run import load_config
from ffnscope.run.dry_run import dry_run
from runs import quiet_run

MODULE = '''
from ffnscope import WeightedPageRankScorer, scorer

@scorer("pagerank_half")
class Half(WeightedPageRankScorer):
    """Weighted PageRank with half of the weight on the graph."""

    def __init__(self, gamma: float = 0.5, theta: float = 1.0) -> None:
        super().__init__(gamma, theta)
'''
ALONE = {"scar": {"enabled": False}}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(METRICS, "_items", {name: METRICS.get(name) for name in METRICS.names()})
    (tmp_path / "halves_of_mine.py").write_text(MODULE)
    return "halves_of_mine"


def test_one_scorer_with_two_sets_of_parameters(small: Any, module: str) -> None:
    blocks = {"weighted_pagerank": {"gamma": 0.9}, "pagerank_half": {"theta": 0.25}}
    config = small(
        metrics={**ALONE, "modules": [module], **blocks},
        pruning={"algorithms": ["weighted_pagerank", "pagerank_half", "pagerank_half_chained"], "allocator": "global"},
    )
    assert config.metrics.modules == (module,)
    quiet_run(config)
    found, _ = read_scores(config.output_dir / "scores.safetensors")
    assert found["pagerank_half"].facts["params"] == {"gamma": 0.5, "theta": 0.25}
    stats, _ = read_stats(config.output_dir / "statistics.safetensors")
    model = fs.load_model(config.model.model_id).model
    expected = fs.score(model, stats, "weighted_pagerank", gamma=0.5, theta=0.25)
    for site, value in expected.values.items():
        assert found["pagerank_half"].values[site].allclose(value, rtol=1e-5)
    assert load_config(config.output_dir / "experiment_config.yaml") == config


def test_a_module_that_is_not_there_is_told_with_its_place(small: Any) -> None:
    with pytest.raises(ConfigError, match=r"metrics.modules\[0\]: module 'no_such_thing' cannot be imported"):
        small(metrics={"modules": ["no_such_thing"]})


def test_impossible_parameters_are_all_told_at_once(small: Any) -> None:
    with pytest.raises(ConfigError) as error:
        small(metrics={"weighted_pagerank": {"gamma": 2.0}, "graph_katz": {"attenuation": 0.0}})
    assert error.value.problems == [
        "metrics.weighted_pagerank: gamma of weighted PageRank must be in [0, 1]; got 2.",
        "metrics.graph_katz: attenuation must be in (0, 1], the share that a path keeps per edge; got 0.",
    ]


def test_a_contrast_of_two_texts(small: Any, tmp_path: Path, texts: Path) -> None:
    plain = small(output={"dir": str(tmp_path / "plain")}, metrics=ALONE, pruning={"algorithms": ["graph_cheirank"]})
    quiet_run(plain)
    asked: dict[str, Any] = {
        "dataset": {"name": str(texts / "test.txt")},
        "evaluation": {"name": str(texts / "train.txt")},
        "pruning": {"algorithms": ["graph_cheirank"], "ratios": [0.25]},
    }
    other = str(tmp_path / "plain" / "statistics.safetensors")
    contrast = {**ALONE, "graph_cheirank": {"teleport": "contrast"}}
    config = small(**asked, metrics={**contrast, "background": other})
    quiet_run(config)
    found, facts = read_scores(config.output_dir / "scores.safetensors")
    stats, _ = read_stats(config.output_dir / "statistics.safetensors")
    given: Any = {"background": read_stats(Path(other))[0], "teleport": "contrast"}
    expected = fs.score(fs.load_model(config.model.model_id).model, stats, "graph_cheirank", **given)
    for site, value in expected.values.items():
        assert found["graph_cheirank"].values[site].allclose(value, rtol=1e-5)
    assert facts["background"]

    with pytest.raises(ConfigError, match=r"metrics.graph_cheirank.teleport: 'contrast' compares two texts"):
        small(**asked, metrics=contrast)
    with pytest.raises(ConfigError, match=r"metrics.background: would do nothing"):
        small(metrics={"background": other})
    lost = small(**asked, metrics={**contrast, "background": "nowhere.st"}, output={"dir": str(tmp_path / "lost")})
    for start in (quiet_run, lambda config: dry_run(config, Console(quiet=True))):
        with pytest.raises(ArtifactError, match="nowhere"):
            start(lost)
