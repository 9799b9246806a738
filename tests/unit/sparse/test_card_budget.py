"""Cards within a budget of bytes; what cards tell of the oracle, and their map by layer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from card_sets import RULE, Set
from ffnscope.budget import Budget
from ffnscope.errors import ArtifactError, UnknownNameError, UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.io import write_plan
from ffnscope.report.card_plot import CELLS, draw_card_cells
from ffnscope.report.card_table import card_sentences
from ffnscope.sparse.calibration import Target
from ffnscope.sparse.card import WantedChannels, target_words
from ffnscope.sparse.card_files import read_card, write_card
from ffnscope.sparse.card_options import BytesTarget, Certify, parse_target
from ffnscope.sparse.fit import fit_card
from ffnscope.sparse.gap import GAPS, oracle_gaps
from ffnscope.sparse.measures import truth_of
from ffnscope.sparse.rule import SelectionRule
from ffnscope.types import PruningPlan

DENSITIES = (0.8, 0.5, 0.3, 0.1)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Set:
    return Set(tmp_path_factory.mktemp("card"))


class TestBytes:
    def test_the_highest_density_that_reads_no_more(self, one: Set) -> None:
        shares = {}
        for density in DENSITIES:
            card = one.fit(target=Target("density", density))
            shares[density] = card.bytes_read / card.bytes_dense
        for budget in (shares[0.5], (shares[0.5] + shares[0.3]) / 2):
            card = one.fit(target=BytesTarget(budget), densities=DENSITIES)
            assert card.target == ("bytes", budget) and card.bytes_read <= budget * card.bytes_dense * (1 + 1e-9)
            assert card.bytes_read / card.bytes_dense == pytest.approx(shares[0.5 if budget == shares[0.5] else 0.3])

    def test_one_hundredth_of_the_channels_less_would_do(self, one: Set) -> None:
        """Without densities of the caller, one density is found to a hundredth."""
        card = one.fit(target=BytesTarget(0.6))
        (k,) = {row.parameter for row in card.sites}
        more = one.fit(target=Target("density", (k + 1) / card.sites[0].site.d_ff))
        assert card.bytes_read <= 0.6 * card.bytes_dense < more.bytes_read

    @pytest.mark.parametrize("kind", ["relative_error", "measured"])
    def test_allocated_within_the_same_bytes(self, one: Set, kind: Any) -> None:
        uniform = one.fit(target=BytesTarget(0.7), densities=DENSITIES)
        card = one.fit(target=BytesTarget(0.7), densities=DENSITIES, allocation=kind, floor=0.1)
        assert card.allocation["budget_bytes"] == pytest.approx(uniform.bytes_read)
        assert card.bytes_read <= 0.7 * card.bytes_dense
        told, used = card_sentences(card)[-1], card.allocation["used"] == kind
        assert told.startswith(f"Densities by {kind}: perplexity ") and "at the same bytes (" in told
        assert told.endswith("so it is used." if used else "so it is not used, being not clearly lower.")
        assert not any("Densities" in sentence for sentence in card_sentences(uniform))

    def test_refused(self, one: Set) -> None:
        with pytest.raises(UsageError, match=r"the lowest density reads \d+\.\d% of the dense bytes, .* of 1\.0%"):
            one.fit(target=BytesTarget(0.01), densities=DENSITIES)
        with pytest.raises(UsageError, match="a number of bytes is a cost and has no certificate"):
            one.fit(target=BytesTarget(0.5), certify=Certify())
        with pytest.raises(UsageError, match=r"must be in \(0, 1\), a share of those of the dense FFNs; got 50"):
            parse_target("bytes=50")

    def test_words(self) -> None:
        assert parse_target("bytes=50%") == BytesTarget(0.5)
        assert target_words("bytes", 0.5) == "bytes 50.0% of the dense FFNs"


class TestCore:
    @pytest.fixture
    def plan(self, one: Set, tmp_path: Path) -> Path:
        sites = find_sites(one.model)
        kept = {site: torch.tensor([1, 5 + site.layer]) for site in sites}
        write_plan(tmp_path / "plan.json", PruningPlan(kept, "wanda", "local", Budget(0.9)))
        return tmp_path / "plan.json"

    def test_a_plan_says_what_is_always_kept(self, one: Set, plan: Path, tmp_path: Path) -> None:
        rule = SelectionRule("low_bit", "hybrid", {"group": 16}, {"core": str(plan), "rest": "top_k"})
        card, selectors = fit_card(one.model, one.traces, rule, Target("density", 0.25))
        write_card(tmp_path / "card.json", card)
        plan.unlink()
        again = read_card(tmp_path / "card.json").selectors(one.model)
        for site, selector in selectors.items():
            x = one.traces.x(site)[:40]
            assert again[site].policy.core.tolist() == [1, 5 + site.layer]  # type: ignore[attr-defined]
            assert bool(selector(x)[:, [1, 5 + site.layer]].all()) and torch.equal(again[site](x), selector(x))

    def test_refused(self, one: Set, plan: Path, tmp_path: Path) -> None:
        rule = SelectionRule("low_bit", "hybrid", {"group": 16}, {"core": str(plan)})
        known = rule.identity()
        other = replace(find_sites(one.model)[0], path="model.layers.7.mlp")
        with pytest.raises(UnknownNameError, match=r"Unknown FFN of the plan .* 'model\.layers\.7\.mlp'"):
            rule.check_core([other.name])
        plan.write_text(plan.read_text().replace("wanda", "wandb"))
        assert rule.identity() != known
        missing = SelectionRule("low_bit", "hybrid", {"group": 16}, {"core": str(tmp_path / "none.json")})
        with pytest.raises(ArtifactError, match=r"none\.json does not exist; a parameter names it"):
            one.fit(missing)
        with pytest.raises(UsageError, match="core of policy 'hybrid' must be float or str; got True"):
            SelectionRule("low_bit", "hybrid", {}, {"core": True})


def test_gaps_are_those_of_the_selectors(one: Set) -> None:
    card, selectors = fit_card(one.model, one.traces, RULE, Target("recall", 0.9))
    row = card.sites[1]
    x, selector = one.traces.x(row.site, "test"), selectors[row.site]
    expected = oracle_gaps(selector(x), truth_of(selector.predictor.ffn, x, WantedChannels().label))
    assert set(expected) == set(GAPS)
    for name, values in expected.items():
        assert row.figures["test"][name].mean == pytest.approx(float(values.mean()))


def test_a_map_by_layer(one: Set, tmp_path: Path) -> None:
    card = one.fit()
    axes = draw_card_cells(card).axes[0]
    (image,) = axes.images
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"{name.replace('_', ' ')}, test documents" for name in CELLS
    ]
    place = CELLS.index("missed_mass_gap")
    found = image.get_array()[place].tolist()
    assert found == [pytest.approx(row.figures["test"]["missed_mass_gap"].mean) for row in card.sites]
    old = replace(card.sites[0], figures={"test": {"recall": card.sites[0].figures["test"]["recall"]}})
    cells = draw_card_cells(replace(card, sites=(old, card.sites[1]))).axes[0].images[0].get_array()
    assert math.isnan(cells[1].filled(math.nan)[0]) and not math.isnan(cells[1].filled(math.nan)[1])
