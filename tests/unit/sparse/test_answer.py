"""The answer on a tiny model: equal densities, targets that hold, what reuse costs, and the choice by hand."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.evaluate.intervals import Estimate
from ffnscope.report.answer_table import answer_grids, answer_markdown, print_answer, write_answer
from ffnscope.sparse.answer import answer
from ffnscope.sparse.answer_choice import recommend
from ffnscope.sparse.answer_rows import RULES, AnswerOptions, Calibration, Domain, EqualDensity, Reuse
from ffnscope.sparse.answer_steps import calibrate_rules
from ffnscope.sparse.calibration import Target
from ffnscope.sparse.evaluation import form_losses
from ffnscope.sparse.ffn import ffn_of
from ffnscope.sparse.forms import MaskedForm
from ffnscope.sparse.measures import Summary, measure
from ffnscope.sparse.policies import TopK
from ffnscope.sparse.predictors.low_bit import low_bit
from ffnscope.sparse.selector import Selector
from ffnscope.sparse.tracing import trace
from reference import exact, text

NAMES = ("a", "b", "c")
OPTIONS = AnswerOptions(Target("recall", 0.9), 0.3, params={"bits": 3, "group": 16}, batch_size=4)


def narrow(windows: Windows, low: int, high: int) -> Windows:
    """The same windows of other tokens, so that domains differ."""
    ids = low + windows.input_ids % (high - low)
    return Windows(ids, windows.valid, windows.targets, windows.document, windows.source)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    model, folder = exact("llama"), tmp_path_factory.mktemp("answer")
    domains = {}
    for i, name in enumerate(NAMES):
        windows = narrow(text(20, 16, seed=i), 3 + 20 * i, 23 + 20 * i)
        held = narrow(text(6, 16, seed=10 + i), 3 + 20 * i, 23 + 20 * i)
        domains[name] = Domain(trace(model, windows, folder / name), held)
    steps = []
    return model, domains, answer(model, domains, options=OPTIONS, on_step=lambda *s: steps.append(s)), steps


def test_what_there_is(asked) -> None:
    _, _, found, steps = asked
    assert found.domains == NAMES and found.rule in RULES
    assert [(c.domain, c.rule) for c in found.calibrations[:4]] == [("a", r) for r in RULES] + [("b", "top_k")]
    assert len(found.calibrations) == 2 * 3 * 3 and len(found.equal) == 9 and len(found.reuse) == 6 * 3
    assert steps[0] == ("calibrating", 1, 2) and steps[-1] == ("perplexity", 3, 3)


def test_parameters_reach_the_target_where_they_were_calibrated(asked) -> None:
    model, domains, found, _ = asked
    site = domains["a"].traces.sites[0]
    ffn = ffn_of(model, site)
    k = next(c for c in found.calibrations if (c.domain, c.rule, c.site) == ("a", "top_k", site.name))
    selector = Selector(low_bit(ffn, bits=3, group=16), TopK(), k.parameter)
    fewer = Selector(selector.predictor, TopK(), k.parameter - 1)
    x = domains["a"].traces.x(site, "calibrate")
    assert float(measure(ffn, selector, x, OPTIONS.label).values["recall"].mean()) >= 0.9
    assert float(measure(ffn, fewer, x, OPTIONS.label).values["recall"].mean()) < 0.9
    held_out = measure(ffn, selector, domains["a"].traces.x(site, "test"), OPTIONS.label)
    assert k.reached.value == pytest.approx(float(held_out.values["recall"].mean()))
    assert (k.density.p5, k.density.p95) == (k.parameter / site.d_ff, k.parameter / site.d_ff)


def test_rules_are_compared_at_one_density(asked) -> None:
    model, domains, found, _ = asked
    for one in found.equal:
        top = next(e for e in found.equal if (e.domain, e.rule) == (one.domain, "top_k"))
        assert abs(one.measures["density"].value - top.measures["density"].value) < 0.06
        assert (one.loss is None) == (one.rule == "top_k") == (not one.against)
        if one.against:
            less = one.measures["recall"].value - top.measures["recall"].value
            assert one.against["recall"].value == pytest.approx(less)
    selectors = {}
    for site in domains["b"].traces.sites:
        k = next(c for c in found.calibrations if (c.domain, c.rule, c.site) == ("b", "top_k", site.name))
        selectors[site] = Selector(low_bit(ffn_of(model, site), bits=3, group=16), TopK(), k.parameter)
    windows = domains["b"].windows
    losses = form_losses(model, MaskedForm("k", selectors), windows)
    row = next(e for e in found.equal if (e.domain, e.rule) == ("b", "top_k"))
    assert row.perplexity == pytest.approx(float(torch.exp(losses.nll.sum() / windows.n_targets)))
    assert row.dense_perplexity != row.perplexity
    assert row.text_density == pytest.approx(sum(k.parameter for k in _of(found, "b", "top_k")) / (2 * site.d_ff))
    for one in found.equal:
        assert (one.text_density is None) == (one.perplexity is None)


def _of(found, domain, rule):
    return [c for c in found.calibrations if (c.domain, c.rule) == (domain, rule)]


def test_densities_are_equal_on_the_documents_that_were_calibrated_on(asked) -> None:
    model, domains, _, _ = asked
    rules = calibrate_rules(model, {n: domains[n] for n in NAMES}, domains["a"].traces.sites, OPTIONS, None)
    for site, predictor in rules.predictors.items():
        scores = predictor(domains["a"].traces.x(site, "calibrate"))
        shares = {
            rule: float(policy.select(scores, rules.equal["a", site, rule]).float().mean())
            for rule, policy in rules.policies.items()
        }
        assert shares["threshold"] == pytest.approx(shares["top_k"], abs=2 / scores.numel())
        assert shares["nucleus"] == pytest.approx(shares["top_k"], abs=2 / scores.numel())


def test_reuse_is_paired_with_own_parameters(asked) -> None:
    _, _, found, _ = asked
    for one in found.reuse:
        own = [c for c in found.calibrations if (c.domain, c.rule) == (one.used_on, one.rule)]
        mean = sum(c.reached.value for c in own) / len(own)
        assert one.difference.value == pytest.approx(one.reached.value - mean)
        density = sum(c.density.mean for c in own) / len(own)
        assert one.density_difference == pytest.approx(one.density - density)
        assert one.reached.documents == 4


def test_the_page(asked, tmp_path) -> None:
    _, _, found, _ = asked
    parameters, reached, equal, reuse = answer_grids(found)
    assert len(parameters.columns) == 10 and len(parameters.lines) == 2 and len(reached.lines) == 9
    assert len(equal.lines) == 9 and len(reuse.lines) == 18
    page = answer_markdown(found, "tiny", ["ffnscope of today"])
    assert page.endswith("## Made from\n\n- ffnscope of today\n")
    assert page.startswith("# tiny\n\n**Recommended: ") and "| a, b | top_k |" in page
    console = Console(width=100, record=True, file=io.StringIO())
    print_answer(found, console)
    assert "Recommended" in console.export_text()
    written = json.loads(write_answer(tmp_path / "answer.json", found, {"seed": 4}).read_text())
    assert written["made_from"] == {"seed": 4}
    assert written["target"] == {"measure": "recall", "value": 0.9}
    assert len(written["parameters"]) == 18 and written["recommended"]["rule"] == found.rule


def test_one_domain_is_no_comparison(asked) -> None:
    model, domains, _, _ = asked
    with pytest.raises(UsageError, match="got 1"):
        answer(model, {"a": domains["a"]})


def test_without_windows_missed_mass_decides(asked) -> None:
    model, domains, _, _ = asked
    found = answer(model, {n: Domain(domains[n].traces) for n in ("a", "b")}, options=OPTIONS)
    assert all(one.perplexity is None and one.loss is None for one in found.equal)
    assert "missed mass" in found.reason and answer_grids(found)


class TestChoice:
    def rows(self, **losses):
        equal = [EqualDensity("a", "top_k", {}, {})]
        for rule, (low, high) in losses.items():
            loss = Estimate((low + high) / 2, low, high, 9)
            equal.append(EqualDensity("a", rule, {}, {}, 20.0, 19.0, loss))
        return equal

    def reuse(self, **drift):
        return [
            Reuse("b", "a", rule, Estimate(0.9 - d, None, None, 9), Estimate(-d, -d, -d, 9), 0.5, 0.0)
            for rule, d in drift.items()
        ]

    def choose(self, equal, reuse):
        estimate = Estimate(0.9, None, None, 9)
        made = [Calibration("a", "s", 0, rule, 1.0, estimate, Summary(0.5, 0.4, 0.6)) for rule in RULES]
        return recommend(equal, reuse, made, Target("recall", 0.9))

    def test_the_larger_gain_of_the_steady(self) -> None:
        equal = self.rows(threshold=(-0.05, -0.03), nucleus=(-0.03, -0.01))
        rule, reason = self.choose(equal, self.reuse(top_k=0.01, threshold=0.015, nucleus=0.01))
        assert rule == "threshold" and "40% to 60%" in reason and "-3.92 % in a" in reason
        rule, reason = self.choose(equal, self.reuse(top_k=0.01, threshold=0.05, nucleus=0.01))
        assert rule == "nucleus" and "5.0 points threshold" in reason

    def test_nothing_told_apart(self) -> None:
        equal = self.rows(threshold=(-0.05, 0.03), nucleus=(0.01, 0.02))
        rule, reason = self.choose(equal, self.reuse(top_k=0.01, threshold=0.0, nucleus=0.0))
        assert rule == "top_k" and "not told apart" in reason and "every token costs the same" in reason
