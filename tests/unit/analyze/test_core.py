"""Overlap of the core with other top sets, and its stability."""

from __future__ import annotations

from dataclasses import replace
from math import comb
from typing import Any

import pytest
import torch

from ffnscope.analyze.bootstrap import bootstrap_statistics
from ffnscope.analyze.core import ALL, OUTLIERS, core_overlap, core_stability
from ffnscope.analyze.levels import CoreRule
from ffnscope.calibrate.collect import collect
from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.errors import UsageError
from ffnscope.plan.build import top_core
from ffnscope.scoring import score
from ffnscope.types import FFNSite, Scores
from tiny import tokens


@pytest.fixture
def sites(site: FFNSite) -> list[FFNSite]:
    return [replace(site, layer=i, path=f"layers.{i}.mlp", d_ff=10) for i in range(2)]


def table(metric: str, sites: list[FFNSite], *tops: list[int]) -> Scores:
    values = {}
    for site, top in zip(sites, tops, strict=True):
        values[site] = torch.zeros(site.d_ff)
        values[site][top] = torch.arange(len(top), 0, -1.0)
    return Scores(metric, values)


def tail(shared: int) -> float:
    """P(as many or more shared) of two sets of 3 among 10, by counting."""
    return sum(comb(3, i) * comb(7, 3 - i) for i in range(shared, 4)) / comb(10, 3)


def test_overlap_by_hand(sites: list[FFNSite]):
    core = {sites[0]: torch.tensor([0, 1, 2]), sites[1]: torch.tensor([4, 5, 6])}
    found = core_overlap(core, {"mine": table("mine", sites, [0, 1, 7], [4, 8, 9])})
    first, second, both = found.rows()
    assert (first["shared"], second["shared"], both["shared"]) == (2, 1, 3)
    assert (first["n_core"], first["n_other"], both["n_core"]) == (3, 3, 6)
    assert first["jaccard"] == pytest.approx(2 / 4) and both["jaccard"] == pytest.approx(3 / 9)
    assert first["expected"] == pytest.approx(0.9) and both["expected"] == pytest.approx(1.8)
    assert first["p"] == pytest.approx(tail(2)) and second["p"] == pytest.approx(tail(1))
    assert first["p_adjusted"] == pytest.approx(2 * tail(2))
    assert second["p_adjusted"] == pytest.approx(max(2 * tail(2), tail(1)))
    exact = [tail(i) - tail(i + 1) for i in range(4)]
    together = sum(exact[i] * exact[j] for i in range(4) for j in range(4) if i + j >= 3)
    assert both["p"] == both["p_adjusted"] == pytest.approx(together)
    assert (both["site"], both["layer"]) == (ALL, None)
    assert found.sets["mine"][sites[0]].tolist() == [0, 1, 7]
    assert "<table>" in found._repr_html_()


def test_activation_outliers_are_the_top_by_power(sites: list[FFNSite]):
    core = {s: torch.tensor([0, 1]) for s in sites}
    power, index = (table(n, sites, [3, 2], [0, 1]) for n in ("scar_activation_power", "activation_outlier_index"))
    found = core_overlap(core, {"activation_outlier_index": index})
    assert found.outliers == "activation_outlier_index"
    found = core_overlap(core, {"activation_outlier_index": index, "scar_activation_power": power})
    assert found.outliers == "scar_activation_power"
    assert found.sets[OUTLIERS][sites[0]].tolist() == [2, 3]
    assert core_overlap(core, {"x": table("x", sites, [0], [0])}).outliers is None


def test_the_core_is_not_compared_with_what_defines_it(sites: list[FFNSite]):
    scores = {n: table(n, sites, [3, 2], [0, 1]) for n in ("scar_activation_power", "other")}
    found = core_overlap({s: torch.tensor([0, 1]) for s in sites}, scores, defined_by="other")
    assert {row["other"] for row in found.rows()} == {OUTLIERS, "scar_activation_power"}
    assert set(found.sets) == {OUTLIERS, "scar_activation_power", "other"}


def test_metrics_that_lift_the_core_are_not_compared_with_it(sites: list[FFNSite]):
    name = "supernode_protection_score"
    found = core_overlap({s: torch.tensor([0, 1]) for s in sites}, {name: table(name, sites, [0, 1], [0, 1])})
    assert found.rows() == [] and set(found.sets) == {name}
    assert found.refused == {name: "its scores lift the core above all other channels"}


def test_p_is_one_for_nothing_shared_and_small_for_all(sites: list[FFNSite]):
    core = {s: torch.tensor([0, 1, 2]) for s in sites}
    rows = core_overlap(core, {"x": table("x", sites, [7, 8, 9], [0, 1, 2])}).rows()
    assert rows[0]["p"] == pytest.approx(1.0)
    assert rows[1]["p"] == pytest.approx(1 / 120)


def test_scores_of_other_ffns_are_refused(sites: list[FFNSite]):
    core = {s: torch.tensor([0]) for s in sites}
    with pytest.raises(UsageError, match="scores of 'x' lack FFNs of the core; score the same layers by all metrics"):
        core_overlap(core, {"x": table("x", sites[:1], [0])})
    with pytest.raises(UsageError, match="the core is of no FFN"):
        core_overlap({}, {})


def test_stability_by_hand(sites: list[FFNSite]):
    core = {s: torch.tensor([0, 1, 2]) for s in sites}
    other = {sites[0]: torch.tensor([0, 1, 5]), sites[1]: torch.tensor([0, 1, 2])}
    rows = core_stability(core, {"seed 1": other}).rows()
    assert [r["jaccard"] for r in rows] == pytest.approx([0.5, 1.0, 0.75])
    assert [r["shared"] for r in rows] == [2, 3, 2.5]
    assert rows[-1] == {**rows[-1], "compared": "seed 1", "site": ALL, "layer": None, "n_core": 3}
    with pytest.raises(UsageError, match="the core of 'x' is of other FFNs; calibrate the same layers"):
        core_stability(core, {"x": {sites[0]: core[sites[0]]}})


def test_halves_of_the_documents(llama: Any):
    windows = contiguous_windows(tokens(12, 16), "random tokens")
    names = ["taylor_sq", "act_sq", *bootstrap_statistics(["scar_loss_proxy", "wanda"])]
    stats = collect(llama, windows, names)
    for metric in ("scar_loss_proxy", "wanda"):
        core = top_core(score(llama, stats, metric), count=5)
        found = core_stability(core, {}, rule=CoreRule(metric, count=5), model=llama, stats=stats)
        assert {r["compared"] for r in found.rows()} == {"halves"} and not found.skipped
        assert all(0 < r["jaccard"] <= 1 for r in found.rows())
        again = core_stability(core, {}, rule=CoreRule(metric, count=5), model=llama, stats=stats)
        assert again.rows() == found.rows()


def test_two_halves_alike_give_the_same_core(llama: Any):
    windows = contiguous_windows(tokens(1, 16).repeat(8, 1), "eight times the same")
    stats = collect(llama, windows, ["taylor_sq", *bootstrap_statistics(["scar_loss_proxy"])])
    core = top_core(score(llama, stats, "scar_loss_proxy"), count=5)
    found = core_stability(core, {}, rule=CoreRule(count=5), model=llama, stats=stats)
    assert all(r["jaccard"] == 1 for r in found.rows())


def test_halves_that_cannot_be_told_are_skipped_with_the_reason(llama: Any):
    windows = contiguous_windows(tokens(2, 16), "random tokens")
    stats = collect(llama, windows, ["act_hist", "act_abs"])
    core = top_core(score(llama, stats, "activation_outlier_index"), count=5)
    found = core_stability(core, {}, rule=CoreRule("activation_outlier_index"), model=llama, stats=stats)
    assert found.rows() == []
    assert found.skipped == {"halves": "activation_outlier_index: needs act_hist, which is no sum of vectors"}
