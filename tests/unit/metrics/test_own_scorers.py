"""Scorer classes as metrics: the pipelines' numbers, their parameters, and what is refused."""

from __future__ import annotations

import inspect

import pytest
import torch

import ffnscope as fs
from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.errors import UsageError
from ffnscope.registry import METRICS
from ffnscope.testing import check_metric
from tiny import tiny, tokens
from tiny_moe import tiny_moe

PIPELINES = {"even": fs.IsolatedFFNPipeline, "even_chained": fs.ChainedFFNPipeline}


class Even(fs.BaseScorer):
    """Sizes of outputs times how evenly they read."""

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        if power < 0:
            raise UsageError("power must not be negative.")
        self.power = power

    def score(self, prev_importance, in_activations, out_activations, weight):
        shares = weight / weight.sum(dim=1, keepdim=True).clamp_min(1e-12)
        return (1 - shares.square().sum(dim=1)) * out_activations**self.power + weight @ prev_importance


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(METRICS, "_items", {name: METRICS.get(name) for name in METRICS.names()})


@pytest.fixture
def text():
    return contiguous_windows(tokens(4, 16), "random tokens")


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("model", [lambda: tiny("llama"), lambda: tiny_moe("mixtral")], ids=["dense", "experts"])
def test_the_numbers_are_those_of_the_pipeline(name, model, text):
    fs.scorer("even")(Even)
    model = model()
    found = fs.score(model, fs.calibrate(model, text, [name]), name, power=2.0)
    expected = PIPELINES[name](model, text, Even(2.0), fs.LocalPruner(0.5)).run().scores
    assert found.values.keys() == expected.values.keys()
    for site, value in expected.values.items():
        assert torch.allclose(found.values[site], value, rtol=1e-5), site.name


def test_a_scorer_that_draws_goes_on_from_ffn_to_ffn(text):
    fs.scorer("draws")(fs.RandomScorer)
    model = tiny("llama")
    found = fs.score(model, fs.calibrate(model, text, ["draws"]), "draws", seed=3)
    expected = fs.IsolatedFFNPipeline(model, text, fs.RandomScorer(3), fs.LocalPruner(0.5)).run().scores
    assert all(torch.equal(found.values[site], value) for site, value in expected.values.items())


def test_the_class_stays_and_its_arguments_are_parameters():
    assert fs.scorer("even", source="here")(Even) is Even
    for name in PIPELINES:
        rule = METRICS.get(name)
        assert list(rule.params) == ["power"] and rule.params["power"].kind is inspect.Parameter.KEYWORD_ONLY
        assert rule.source == "here" and rule.summary == "Sizes of outputs times how evenly they read."
        check_metric(name)


def test_two_parameter_sets_are_two_names():
    for gamma in (0.25, 0.75):
        made = type("Half", (fs.WeightedPageRankScorer,), {})
        made.__init__ = lambda self, gamma=gamma: fs.WeightedPageRankScorer.__init__(self, gamma)
        fs.scorer(f"pagerank_{gamma:g}")(made)
    assert METRICS.get("pagerank_0.25_chained").params["gamma"].default == 0.25
    assert METRICS.get("pagerank_0.75").params["gamma"].default == 0.75


def test_values_that_cannot_be_are_refused_before_anything_is_computed(text):
    fs.scorer("even")(Even)
    with pytest.raises(UsageError, match="power must not be negative"):
        METRICS.get("even").needed({"power": -1.0})


def test_what_cannot_be_a_metric_is_refused():
    class Loose(fs.BaseScorer):
        def __init__(self, **others):
            super().__init__()

    with pytest.raises(UsageError, match=r"Loose.__init__ takes \*\*others; name its arguments"):
        fs.scorer("loose")(Loose)
    with pytest.raises(UsageError, match="metric 'wanda' is already registered"):
        fs.scorer("wanda")(Even)
