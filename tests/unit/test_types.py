from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.types import Budget, ChannelStats, FFNSite, FFNWeights, PruningPlan, Scores


def stats(site: FFNSite, total: list[float], largest: list[float], count: int) -> ChannelStats:
    values = {"act_sum": torch.tensor(total), "act_max": torch.tensor(largest)}
    counts = {"act_sum": count, "act_max": count}
    return ChannelStats(site, values, counts, {"act_sum": "sum", "act_max": "max"})


def plan(site: FFNSite, kept: Any, **changes: Any) -> PruningPlan:
    return PruningPlan({site: torch.as_tensor(kept)}, "random", "local", Budget(0.5), **changes)


class TestFFNSite:
    def test_name_and_projections(self, site: FFNSite) -> None:
        assert site.name == "layers.0.mlp"
        assert site.projections == tuple(f"layers.0.mlp.{n}_proj" for n in ("gate", "up", "down"))

    def test_an_expert_has_its_own_name(self, site: FFNSite) -> None:
        assert replace(site, expert=3).name == "layers.0.mlp.experts.3"

    def test_fused_and_plain_projections(self) -> None:
        fused = FFNSite(0, "mlp", "gate_up", "gate_up", "down", 4, 6, fused="gate_up")
        assert fused.projections == ("mlp.gate_up", "mlp.down")
        plain = FFNSite(0, "", None, "fc1", "fc2", 4, 6)
        assert plain.projections == ("fc1", "fc2")

    def test_it_is_a_key_and_cannot_change(self, site: FFNSite) -> None:
        assert {site: 1}[replace(site)] == 1
        with pytest.raises(FrozenInstanceError):
            site.layer = 3  # type: ignore[misc]

    def test_lists_of_a_file_become_tuples(self, site: FFNSite) -> None:
        found = replace(site, adapters=["a"], twins=["layers.1.mlp"])  # type: ignore[arg-type]
        assert (found.adapters, found.twins) == (("a",), ("layers.1.mlp",))
        assert {found: 1}[replace(found)] == 1

    @pytest.mark.parametrize("change", [{"d_ff": 0}, {"d_model": -1}])
    def test_widths_are_positive(self, site: FFNSite, change: dict[str, int]) -> None:
        with pytest.raises(UsageError, match=r"layers\.0\.mlp: d_model and d_ff must be positive"):
            replace(site, **change)

    @pytest.mark.parametrize("change", [{"fused": "gate_up"}, {"gate": "up_proj"}])
    def test_fused_means_that_gate_and_up_are_one(self, site: FFNSite, change: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match="'fused' must be set exactly when gate and up are one projection"):
            replace(site, **change)


class TestFFNWeights:
    def test_shapes_agree(self) -> None:
        FFNWeights(None, torch.zeros(6, 4), torch.zeros(4, 6))
        FFNWeights(torch.zeros(6, 4), torch.zeros(6, 4), torch.zeros(4, 6))

    @pytest.mark.parametrize(
        ("gate", "down"), [(None, torch.zeros(6, 4)), (torch.zeros(4, 6), torch.zeros(4, 6))], ids=["down", "gate"]
    )
    def test_shapes_that_disagree(self, gate: Tensor | None, down: Tensor) -> None:
        with pytest.raises(UsageError, match=r"FFN weights disagree: gate .*, up \(6, 4\)"):
            FFNWeights(gate, torch.zeros(6, 4), down)


class TestChannelStats:
    def test_mean_and_total(self, site: FFNSite) -> None:
        found = stats(site, [2.0, 4.0], [1.0, 3.0], 4)
        assert found.mean("act_sum").tolist() == [0.5, 1.0]
        assert found.total("act_max").tolist() == [1.0, 3.0]
        assert found.n_tokens == 4

    def test_merge_adds_sums_and_takes_maxima(self, site: FFNSite) -> None:
        merged = stats(site, [2.0, 4.0], [1.0, 3.0], 4).merge(stats(site, [1.0, -1.0], [2.0, 0.0], 2))
        assert merged.total("act_sum").tolist() == [3.0, 3.0]
        assert merged.total("act_max").tolist() == [2.0, 3.0]
        assert merged.mean("act_sum").tolist() == [0.5, 0.5]
        assert merged.counts == {"act_sum": 6, "act_max": 6}

    def test_a_maximum_has_no_mean(self, site: FFNSite) -> None:
        with pytest.raises(UsageError, match=r"'act_max' is a maximum over tokens, which has no mean; use total\(\)"):
            stats(site, [1.0], [1.0], 1).mean("act_max")

    def test_nothing_seen(self, site: FFNSite) -> None:
        with pytest.raises(UsageError, match="'act_sum' has seen no token"):
            stats(site, [0.0], [0.0], 0).mean("act_sum")

    def test_a_statistic_that_was_not_collected(self, site: FFNSite) -> None:
        message = r"'grad_sq' was not collected for layers.0.mlp \(collected: act_max, act_sum\)"
        with pytest.raises(UsageError, match=message):
            stats(site, [1.0], [1.0], 1).mean("grad_sq")
        empty = ChannelStats(site, {}, {}, {})
        assert empty.n_tokens == 0
        with pytest.raises(UsageError, match=r"\(collected: none\)"):
            empty.total("grad_sq")

    def test_a_part_without_tokens_has_no_maximum(self, site: FFNSite) -> None:
        some, none = stats(site, [2.0], [-3.0], 4), stats(site, [0.0], [0.0], 0)
        for merged in (some.merge(none), none.merge(some)):
            assert merged.total("act_max").tolist() == [-3.0]
            assert merged.total("act_sum").tolist() == [2.0]
            assert merged.counts == {"act_sum": 4, "act_max": 4}

    def test_parts_of_different_sites_do_not_merge(self, site: FFNSite) -> None:
        with pytest.raises(UsageError, match=r"cannot merge statistics of layers.0.mlp with those of layers.1.mlp"):
            stats(site, [1.0], [1.0], 1).merge(stats(replace(site, path="layers.1.mlp"), [1.0], [1.0], 1))

    def test_names_agree(self, site: FFNSite) -> None:
        with pytest.raises(UsageError, match="must name the same statistics"):
            ChannelStats(site, {"a": torch.zeros(1)}, {"a": 1}, {})


class TestScores:
    def test_sites_in_order(self, site: FFNSite) -> None:
        other = replace(site, path="layers.1.mlp")
        assert Scores("random", {other: torch.zeros(6), site: torch.zeros(6)}).sites == (other, site)

    def test_wrong_shape(self, site: FFNSite) -> None:
        message = r"metric 'mine' returned shape \(5,\) for layers.0.mlp; expected \(6,\) = \(d_ff,\)"
        with pytest.raises(UsageError, match=message):
            Scores("mine", {site: torch.zeros(5)})

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_not_finite(self, site: FFNSite, bad: float) -> None:
        value = torch.zeros(6)
        value[1:3] = bad
        with pytest.raises(NonFiniteError, match=r"'mine' is NaN or infinite for 2 of 6 channels of layers.0.mlp"):
            Scores("mine", {site: value})


class TestBudget:
    @pytest.mark.parametrize("sparsity", [1.0, 30, -0.1, float("nan"), float("inf")])
    def test_sparsity_is_a_fraction(self, sparsity: float) -> None:
        with pytest.raises(UsageError, match=r"sparsity must be in \[0, 1\), the fraction of channels to remove; got"):
            Budget(sparsity)

    @pytest.mark.parametrize("change", [{"multiple_of": 0}, {"min_width": 0}])
    def test_widths_are_positive(self, change: dict[str, int]) -> None:
        with pytest.raises(UsageError, match="multiple_of and min_width must be at least 1"):
            Budget(0.5, **change)


class TestPruningPlan:
    def test_widths_masks_and_sparsity(self, site: FFNSite) -> None:
        found = plan(site, [0, 2, 5])
        assert found.widths == {site: 3}
        assert found.mask(site).tolist() == [True, False, True, False, False, True]
        assert found.removed(site).tolist() == [1, 3, 4]
        assert found.sparsity == 0.5

    def test_sparsity_is_exact(self, site: FFNSite) -> None:
        assert plan(replace(site, d_ff=10), list(range(7))).sparsity == 0.3
        assert PruningPlan({}, "random", "local", Budget(0.0)).sparsity == 0.0

    @pytest.mark.parametrize("kept", [[2, 0], [1, 1], [-1, 2], [4, 6]], ids=["order", "twice", "negative", "beyond"])
    def test_impossible_indices(self, site: FFNSite, kept: list[int]) -> None:
        message = r"plan for layers.0.mlp: kept channels must be unique, sorted and in \[0, 6\); got 2 from"
        with pytest.raises(UsageError, match=message):
            plan(site, kept)

    @pytest.mark.parametrize(
        "kept",
        [torch.zeros(0, dtype=torch.int64), torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([True])],
        ids=["empty", "float", "matrix", "mask"],
    )
    def test_not_an_index(self, site: FFNSite, kept: Tensor) -> None:
        with pytest.raises(UsageError, match="expected a one-dimensional, non-empty int64 index"):
            plan(site, kept)
