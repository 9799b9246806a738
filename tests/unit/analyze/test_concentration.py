"""Concentration of metrics, with bootstrap and jackknife intervals over documents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ffnscope.analyze.bootstrap import Bootstrap, bootstrap_interval, bootstrap_statistics, why_not
from ffnscope.analyze.concentration import ALL, concentration
from ffnscope.analyze.question import Question
from ffnscope.analyze.repeats import repeat_scores
from ffnscope.calibrate.collect import PassOptions, collect
from ffnscope.calibrate.groups import document_groups
from ffnscope.calibrate.windows import Windows, contiguous_windows
from ffnscope.errors import UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.metrics.concentration import spread_shape
from ffnscope.registry import METRICS
from ffnscope.scoring import score
from ffnscope.types import ChannelStats, FFNSite, Scores
from tiny import LAYERS, tiny, tokens

NAMES = ("scar_loss_proxy", "wanda", "activation_variance", "weight_magnitude", "average_redundancy")


def text(documents: int = 6) -> Windows:
    return contiguous_windows(tokens(2 * documents, 16), "random tokens", torch.arange(2 * documents) // 2)


@pytest.fixture(scope="module")
def measured() -> tuple[Any, dict[str, Scores], Bootstrap, Windows]:
    model, windows = tiny("llama"), text()
    needs = {n for m in NAMES for n in METRICS.get(m).needed({})}
    stats = collect(model, windows, sorted({*needs, *bootstrap_statistics(NAMES)}))
    return model, {m: score(model, stats, m) for m in NAMES}, Bootstrap(model, stats), windows


def test_what_a_bootstrap_needs():
    found = bootstrap_statistics(["scar_loss_proxy", "wanda", "average_redundancy", "weight_magnitude"])
    assert found == ["taylor_sq_by_document", "act_sq_by_document", "targets_by_document", "tokens_by_document"]
    assert why_not("scar_loss_proxy", {}) is None
    assert why_not("average_redundancy", {}) == "needs h_outer, which is no sum of vectors"
    assert why_not("activation_outlier_index", {}) == "needs act_hist, which is no sum of vectors"
    assert why_not("weight_magnitude", {}) == "no text"
    assert why_not("supernode_protection_score", {}) == "needs more than sums of one FFN"


def test_a_draw_is_the_text_with_copies_of_its_documents(measured: Any):
    """Scores of a draw are those of a calibration on a text that holds each document so often."""
    model, _, sums, windows = measured
    copies = torch.tensor([[2.0, 0, 1, 0, 3, 0]], dtype=torch.float64)
    documents = [int(windows.document[mask].unique()) for mask in document_groups(windows, 64)]
    for metric in ("scar_loss_proxy", "wanda", "activation_variance"):
        site = find_sites(model)[1]
        rows = [(windows.document == d).nonzero().flatten() for d in documents]
        chosen = torch.cat([part.repeat(int(n)) for part, n in zip(rows, copies[0], strict=True)])
        again = collect(model, windows[chosen], METRICS.get(metric).needed({}))
        expected = score(model, again, metric).values[site]
        found = sums.scores(site, metric, {}, copies)
        assert torch.allclose(found[0], expected, rtol=1e-4), metric


def test_rows_hold_what_the_kernels_say(measured: Any):
    _, scores, sums, _ = measured
    found = concentration(scores, bootstrap=sums)
    rows = found.rows()
    assert [r["site"] for r in rows if r["metric"] == "wanda"] == [*(s.name for s in scores["wanda"].sites), ALL]
    for row in rows:
        sign = METRICS.get(row["metric"]).natural_sign
        values = [sign * v for s, v in scores[row["metric"]].values.items() if row["site"] in (s.name, ALL)]
        expected = spread_shape(torch.cat(values)).tolist()
        assert [row[n] for n in ("top1", "top5", "top10", "gini", "participation")] == pytest.approx(expected)
        for name in ("top1", "gini", "participation"):
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            assert (low is None) == (high is None)
            assert low is None or 0 <= low <= row[name] <= high <= 1
    methods = {r["metric"]: r["method"] for r in rows}
    assert methods["scar_loss_proxy"] == methods["wanda"] == "bootstrap of 6 groups of documents"
    assert methods["weight_magnitude"] == "none: no text"
    assert methods["average_redundancy"] == "none: needs h_outer, which is no sum of vectors"
    assert all(curve[0] == 0 and curve[-1] == pytest.approx(1) for c in found.curves.values() for curve in c.values())
    assert len(found.curves["wanda"]) == LAYERS + 1
    assert "<table>" in found._repr_html_()


def test_the_headline(measured: Any):
    _, scores, sums, _ = measured
    found = concentration({"scar_loss_proxy": scores["scar_loss_proxy"]}, bootstrap=sums)
    tops = [row["top1"] for row in found.rows() if row["site"] != ALL]
    one = found.medians["scar_loss_proxy"]
    assert (one.least, one.greatest, one.n_sites) == (min(tops), max(tops), LAYERS)
    assert one.value == pytest.approx(sum(tops) / 2)
    assert one.interval is not None and one.interval[0] <= one.value <= one.interval[1]
    sentence = found.headline()
    assert sentence.startswith(
        f"The top 1 % of the channels of each FFN hold a median {100 * one.value:.1f} % of its scar_loss"
    )
    assert "95 % interval of the median by document" in sentence
    with pytest.raises(UsageError, match="there is no concentration of 'wanda': it was not among the scores"):
        found.headline("wanda")


def test_the_jackknife_is_for_what_has_no_bootstrap(measured: Any):
    model, scores, sums, windows = measured
    repeat = repeat_scores(Question(model, find_sites(model), {"average_redundancy": {}}), windows, groups=4)
    found = concentration(scores, bootstrap=sums, repeat=repeat)
    methods = {r["metric"]: r["method"] for r in found.rows()}
    assert methods["average_redundancy"] == "jackknife of 4 groups of documents"
    assert methods["wanda"].startswith("bootstrap")
    row = next(r for r in found.rows() if r["metric"] == "average_redundancy")
    assert row["top1_low"] <= row["top1"] <= row["top1_high"]


def test_what_is_no_mass_is_refused_by_name(site: FFNSite):
    values = torch.tensor([1.0, -2, 3, -4, 5, 6])
    scores = {
        "mine": Scores("mine", {site: values}),
        "empty": Scores("empty", {site: torch.zeros(6)}),
        "supernode_protection_score": Scores("supernode_protection_score", {site: values.abs()}),
    }
    found = concentration(scores)
    assert found.rows() == []
    assert (
        found.refused["mine"] == f"2 channels of {site.name} have a negative value, so shares of a sum are not defined"
    )
    assert found.refused[f"empty of {site.name}"] == "all values are 0"
    assert found.refused["empty"] == "no FFN has any mass"
    assert "lift the core" in found.refused["supernode_protection_score"]
    with pytest.raises(UsageError, match="there are no scores whose concentration could be measured"):
        concentration({})


def test_the_natural_value_is_what_has_mass(site: FFNSite):
    """average_redundancy is told as a redundancy, so its scores, which are high = keep, are negative."""
    redundancy = torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    found = concentration({"average_redundancy": Scores("average_redundancy", {site: -redundancy})})
    assert found.rows()[0]["top1"] == pytest.approx(0.5)


def test_one_document_has_no_interval(measured: Any):
    model, scores, _, windows = measured
    alone = replace(windows, document=torch.zeros_like(windows.document))
    stats = collect(model, alone, ["taylor_sq_by_document", "targets_by_document"])
    found = concentration({"scar_loss_proxy": scores["scar_loss_proxy"]}, bootstrap=Bootstrap(model, stats))
    assert found.spreads[0].method == "none: one document"
    assert "no interval" in found.headline()
    with pytest.raises(UsageError, match="a bootstrap needs at least 2 draws, better 200; got 1"):
        Bootstrap(model, stats, draws=1)
    with pytest.raises(UsageError, match="metric 'scar_loss_proxy' has no bootstrap over documents: one document"):
        Bootstrap(model, stats).scores(find_sites(model)[0], "scar_loss_proxy", {}, torch.ones(1, 1))


def test_the_bootstrap_covers_the_truth(llama: Any):
    """Loss proxies of 40 documents around known means: the 95 % interval of the top 1 % holds the true share."""
    site = replace(find_sites(llama)[0], d_ff=200)
    random = torch.Generator().manual_seed(0)
    truth = torch.exp(1.2 * torch.randn(200, generator=random, dtype=torch.float64))
    true_share = float(spread_shape(truth)[0])
    held, n = 0, 60
    for _ in range(n):
        noise = -torch.rand(40, 200, generator=random, dtype=torch.float64).log()  # exponential, mean 1
        sums = 2 * truth * noise
        values = {"taylor_sq_by_document": sums, "targets_by_document": torch.ones(40, dtype=torch.float64)}
        copies = torch.randint(40, (200, 40), generator=random)
        weights = torch.zeros(200, 40, dtype=torch.float64).scatter_add_(1, copies, torch.ones(200, 40).double())
        part = ChannelStats(site, values, dict.fromkeys(values, 40), dict.fromkeys(values, "sum"))
        drawn = spread_shape(weights @ part.values["taylor_sq_by_document"])[:, 0]
        found = bootstrap_interval(float(spread_shape(sums.sum(0))[0]), drawn, 40, (0.0, 1.0))
        assert found is not None
        held += found[0] <= true_share <= found[1]
    assert held / n >= 0.87


def test_the_interval_by_hand():
    drawn = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64)
    low, high = bootstrap_interval(0.45, drawn, 5, (0.0, 1.0)) or (0, 0)
    half = 2.7764451 * 0.1 * (5 / 4) ** 0.5  # Student's t with 4 degrees of freedom
    assert (low, high) == pytest.approx((0.4 - half, 0.4 + half))
    assert bootstrap_interval(0.9, torch.tensor([0.9, 0.9]), 5, (0.0, 1.0)) == pytest.approx((0.9, 0.9))
    assert bootstrap_interval(0.9, torch.tensor([0.9, torch.nan]), 5, (0.0, 1.0)) is None


def test_results_do_not_depend_on_the_batch(measured: Any):
    model, _, _, windows = measured
    names = ["taylor_sq", *bootstrap_statistics(["scar_loss_proxy"])]
    rows = []
    for size in (1, 5):
        stats = collect(model, windows, names, options=PassOptions(size))
        scores = {"scar_loss_proxy": score(model, stats, "scar_loss_proxy")}
        rows.append(concentration(scores, bootstrap=Bootstrap(model, stats)).rows())
    for a, b in zip(*rows, strict=True):
        assert [a[k] for k in a if k.startswith("top")] == pytest.approx(
            [b[k] for k in b if k.startswith("top")], rel=1e-3
        )
