"""Lines of a comparison, the oracle gap, measures per FFN, and every baseline."""

from __future__ import annotations

import math

import pytest
import torch

from ffnscope.errors import UnknownNameError, UsageError
from ffnscope.evaluate.perplexity import perplexity
from ffnscope.ffn.function import FFN
from ffnscope.ffn.sites import find_sites
from ffnscope.registry import POLICIES, PREDICTORS
from ffnscope.sparse.baselines import BASELINES, at_density, baseline, fit_predictors, selectors_of
from ffnscope.sparse.costs import low_bit_share, predictor_bytes
from ffnscope.sparse.evaluation import compare_forms, form_losses
from ffnscope.sparse.ffn import ffn_of
from ffnscope.sparse.forms import MaskedForm
from ffnscope.sparse.gap import oracle_gaps
from ffnscope.sparse.labels import largest
from ffnscope.sparse.measures import Truth, measure
from ffnscope.sparse.policies import TopK
from ffnscope.sparse.predictors.exact import oracle
from ffnscope.sparse.selector import Selector
from ffnscope.sparse.site_measures import SITE_MEASURES, measure_sites
from ffnscope.sparse.tracing import trace
from ffnscope.types import FFNWeights
from reference import exact, text
from tiny import tiny


def label(c):
    return largest(c, 0.3)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    model = exact("llama")
    return model, trace(model, text(20, 24), tmp_path_factory.mktemp("traces") / "t")


class TestRows:
    def test_dense_first_and_differences_paired_by_document(self) -> None:
        model, windows = exact("llama"), text(6)
        windows.document[:] = torch.tensor([0, 0, 1, 1, 2, 2])
        sites = find_sites(model)
        form = MaskedForm("half", {s: Selector(oracle(ffn_of(model, s)), TopK(), s.d_ff // 2) for s in sites})
        calls = []
        dense, half = compare_forms(model, [form], windows, batch_size=2, on_batch=lambda *step: calls.append(step))
        assert calls == [(i, 6) for i in range(1, 7)]
        assert dense.perplexity == perplexity(model, windows, batch_size=2)
        assert (dense.difference, dense.density, dense.bytes_share) == (None, None, 1.0)
        nll = form_losses(model, form, windows).nll
        assert half.perplexity.value == pytest.approx(math.exp(float(nll.sum()) / windows.n_targets))
        assert half.difference.documents == 3
        assert half.difference.value == pytest.approx(math.log(half.perplexity.value / dense.perplexity.value))
        assert half.density == pytest.approx(0.5)
        assert half.bytes_share == pytest.approx((2 + 0.5) / 3, abs=0.03)  # the oracle reads gate and up
        assert half.flat()["loss_difference_value"] == half.difference.value
        assert dense.flat()["loss_difference_low"] is None and dense.flat().keys() == half.flat().keys()

    def test_ffns_that_stay_dense_count_whole(self) -> None:
        model, windows = tiny("llama"), text(4)
        site = find_sites(model)[0]
        (_, row) = compare_forms(
            model, [MaskedForm("one", {site: Selector(oracle(ffn_of(model, site)), TopK(), 0)})], windows
        )
        assert row.bytes_share == pytest.approx((1 + 2 / 3) / 2, abs=0.03)
        assert row.densities == {site.name: 0.0}


class TestGap:
    def test_by_hand(self) -> None:
        c = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 4)
        truth = Truth(c, c, c > 0, torch.eye(4))
        mask = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]).bool()
        found = oracle_gaps(mask, truth)
        assert found["missed_mass_gap"].tolist() == pytest.approx([0.5 - 0.3, 0, 0, 0.9 - 0.6])
        assert found["density_ratio"].tolist() == [1.0, 1.0, 1.0, 1.0]  # 5 and 1 take as many channels: 4 + 3, 4
        errors = [(math.sqrt(17) - math.sqrt(5)) / math.sqrt(30), 0, 0]
        assert found["error_gap"].tolist()[:3] == pytest.approx(errors)
        worse = oracle_gaps(torch.tensor([[0, 0, 1, 1]] * 4).bool(), truth)
        assert worse["density_ratio"].tolist() == [2.0] * 4

    def test_the_oracle_has_none_and_nothing_beats_it(self) -> None:
        random = torch.Generator().manual_seed(0)
        weights = [torch.randn(*shape, generator=random) for shape in ((12, 8), (12, 8), (8, 12))]
        ffn = FFN(FFNWeights(*weights), torch.nn.functional.silu)
        x = torch.randn(30, 8, generator=random)
        c = ffn.contributions(x)
        truth = Truth(ffn.h(x), c, label(c), weights[2])
        best = oracle_gaps(TopK().select(c, 5), truth)
        assert all(float(best[name].abs().max()) == 0 for name in ("missed_mass_gap", "error_gap"))
        assert torch.equal(best["density_ratio"], torch.ones(30).double())
        other = oracle_gaps(torch.rand(30, 12, generator=random) < 0.5, truth)
        assert float(other["missed_mass_gap"].min()) >= -1e-12
        assert float(other["density_ratio"].min()) >= 1


class TestSites:
    def test_the_same_as_measure_with_intervals_by_document(self, traced) -> None:
        model, traces = traced
        selectors = selectors_of(model, traces, baseline("4-bit proxy threshold"), 0.4)
        found = measure_sites(model, traces, selectors, label)
        assert [one.site for one in found] == list(traces.sites)
        for one in found:
            x = traces.x(one.site, "test")
            ffn = ffn_of(model, one.site)
            expected = measure(ffn, selectors[one.site], x, label).summary()
            assert {n: one.values[n].summary for n in expected} == expected
            assert one.values["recall"].estimate.documents == len(traces.parts["test"])
            assert one.values["recall"].estimate.value == pytest.approx(expected["recall"].mean)
            assert one.n_tokens == len(x)
        row = found[0].flat("proxy")
        assert row["recall_low"] < row["recall"] < row["recall_high"] and row["label"] == "proxy"
        assert {name for name in SITE_MEASURES if name not in row} == set()


class TestBaselines:
    @pytest.mark.parametrize("name", [name for name, row in BASELINES.items() if row.parameter is None])
    def test_every_row_has_the_density_asked(self, name, traced) -> None:
        model, traces = traced
        row = baseline(name)
        selectors = selectors_of(model, traces, row, 0.4)
        for site, selector in selectors.items():
            ahead = selector.predictor.lookahead
            assert (selector.source is not None) == bool(ahead) == (name.endswith("ahead") and site.layer > 0)
            tokens = traces.fit_tokens(site, "calibrate", lookahead=ahead)
            mask = selector.of_scores(selector.predictor(tokens.x if tokens.earlier is None else tokens.earlier))
            assert mask.shape[1] == site.d_ff
            slack = 1 / site.d_ff if row.policy in ("top_k", "bank_top_k") else 1e-2
            assert 0.4 - slack <= float(mask.double().mean()) <= 0.4 + 1e-9

    @pytest.mark.parametrize("name", [name for name, row in BASELINES.items() if row.parameter is not None])
    def test_a_parameter_of_its_own_needs_no_density(self, name, traced) -> None:
        model, traces = traced
        one, other = (selectors_of(model, traces, baseline(name), density) for density in (0.4, 0.1))
        for site, selector in one.items():
            assert selector.parameter == other[site].parameter == baseline(name).parameter
            x = traces.x(site, "test")
            assert torch.equal(selector(x), selector.predictor(x) >= selector.parameter)

    def test_every_predictor_and_policy_has_a_row(self) -> None:
        """But for predictors from files, which are those of "trained low rank"."""
        rows = BASELINES.values()
        assert {row.predictor for row in rows} == set(PREDICTORS.names()) - {"fc_files"}
        assert {row.policy for row in rows} == set(POLICIES.names())

    def test_caps_and_core_are_those_of_the_density(self, traced) -> None:
        model, traces = traced
        capped = selectors_of(model, traces, baseline("4-bit proxy capped threshold"), 0.4)
        hybrid = selectors_of(model, traces, baseline("4-bit proxy, core and nucleus"), 0.4)
        for site in traces.sites:
            policy = capped[site].policy
            assert (policy.k_min, policy.k_max) == (round(0.2 * site.d_ff), round(0.8 * site.d_ff))
            assert len(hybrid[site].policy.core) == round(0.02 * site.d_ff)

    def test_fitted_once_for_several_densities(self, traced) -> None:
        model, traces = traced
        row = baseline("CHESS")
        predictors = fit_predictors(model, traces, row)
        for density in (0.2, 0.6):
            direct = selectors_of(model, traces, row, density)
            for site, one in at_density(traces, predictors, row, density).items():
                assert one.parameter == direct[site].parameter

    def test_ranks_at_equal_bytes(self, traced) -> None:
        model, traces = traced
        for name, n in (
            ("whitened SVD, bytes of the 4-bit proxy", 2),
            ("trained low rank, bytes of the 4-bit proxy", 1),
        ):
            for one in fit_predictors(model, traces, baseline(name)).values():
                own = one.ffn
                vectors = 2 * own.d_ff if n == 2 else 0  # norms
                wanted = low_bit_share(4) * 2 * (2 * own.d_ff * own.d_model)
                found = predictor_bytes(one) - vectors
                assert wanted - n * 2 * (own.d_ff + own.d_model) < found <= wanted

    def test_rows_for_gated_ffns(self, tmp_path) -> None:
        model = tiny("gpt2")
        traces = trace(model, text(6), tmp_path / "t")
        with pytest.raises(UsageError, match="for gated FFNs"):
            selectors_of(model, traces, baseline("CATS"), 0.5)
        assert selectors_of(model, traces, baseline("4-bit proxy top-k"), 0.5)

    def test_unknown(self) -> None:
        with pytest.raises(UnknownNameError, match="Did you mean 'CATS'"):
            baseline("CAT")
