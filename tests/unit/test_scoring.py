from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope import registry
from ffnscope.errors import LayoutError, NonFiniteError, UnknownNameError, UsageError
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.registry import METRICS
from ffnscope.scoring import not_finite_weight, score
from ffnscope.types import ChannelStats, FFNSite, FFNWeights
from tiny import D_FF, tiny


@pytest.fixture
def sites(llama: Any) -> list[FFNSite]:
    return find_sites(llama)


@pytest.fixture
def stats(sites: list[FFNSite]) -> dict[FFNSite, ChannelStats]:
    values = {"act_sq": torch.arange(1.0, D_FF + 1, dtype=torch.float64)}
    return {s: ChannelStats(s, values, {"act_sq": 4}, {"act_sq": "sum"}) for s in sites}


def statistics_of_core(site: FFNSite) -> ChannelStats:
    """What a supernode metric needs, with channel 0 as the core."""
    values = {"taylor_sum": torch.zeros(D_FF), "taylor_sq": torch.ones(D_FF), "taylor_core": torch.ones(1, D_FF)}
    return ChannelStats(site, values, dict.fromkeys(values, 1), dict.fromkeys(values, "sum"))


@pytest.fixture
def probe_metric() -> Iterator[list[tuple[ChannelStats, FFNWeights, float]]]:
    """A metric that records what it is called with."""
    METRICS.names()
    calls: list[tuple[ChannelStats, FFNWeights, float]] = []

    @registry.metric("recording", source="here")
    def recording(stats: ChannelStats, weights: FFNWeights, *, power: float = 2.0) -> Tensor:
        calls.append((stats, weights, power))
        return weights.up.norm(dim=1) ** power

    yield calls
    del METRICS._items["recording"]


def test_scores_by_hand(llama: Any, stats: dict[FFNSite, ChannelStats]) -> None:
    found = score(llama, stats, "wanda")
    assert found.metric == "wanda" and list(found.values) == list(stats)
    for site, value in found.values.items():
        down = llama.get_submodule(f"{site.path}.{site.down}").weight.detach().double()
        rms = (torch.arange(1.0, D_FF + 1, dtype=torch.float64) / 4).sqrt()
        torch.testing.assert_close(value, rms * down.abs().sum(0), rtol=1e-6, atol=0)
        assert value.dtype == torch.float64 and not value.requires_grad


def test_sites_are_enough_for_a_metric_without_text(llama: Any, sites: list[FFNSite]) -> None:
    found = score(llama, sites[1:], "weight_magnitude")
    assert found.sites == (sites[1],)


def test_parameters_reach_the_metric_and_the_facts(llama: Any, sites: list[FFNSite], probe_metric: Any) -> None:
    first = score(llama, sites, "recording")
    second = score(llama, sites, "recording", {"text": "t"}, power=1.0)
    assert [call[2] for call in probe_metric] == [2.0, 2.0, 1.0, 1.0]
    assert first.facts == {"params": {"power": 2.0}, "source": "here"}
    assert second.facts == {"params": {"power": 1.0}, "source": "here", "text": "t"}
    torch.testing.assert_close(first.values[sites[0]], second.values[sites[0]] ** 2)


def test_weights_are_views_of_the_model(llama: Any, sites: list[FFNSite], probe_metric: Any) -> None:
    score(llama, sites, "recording")
    for site, (_, weights, _) in zip(sites, probe_metric, strict=True):
        assert weights.up.data_ptr() == weights_of(llama, site).up.data_ptr()


def test_the_random_floor_is_seeded_and_differs_between_sites(llama: Any, sites: list[FFNSite]) -> None:
    first, again, other = (score(llama, sites, "random", seed=s) for s in (0, 0, 1))
    for site in sites:
        assert torch.equal(first.values[site], again.values[site])
        assert not torch.equal(first.values[site], other.values[site])
    assert not torch.equal(*first.values.values())


def test_scores_do_not_depend_on_which_sites_are_scored_together(llama: Any, sites: list[FFNSite]) -> None:
    whole = score(llama, sites, "random")
    assert torch.equal(score(llama, sites[1:], "random").values[sites[1]], whole.values[sites[1]])


class TestErrors:
    def test_unknown_metric(self, llama: Any, sites: list[FFNSite]) -> None:
        with pytest.raises(UnknownNameError, match=r"Unknown metric 'wandas'. Did you mean 'wanda'\?"):
            score(llama, sites, "wandas")

    def test_unknown_parameter(self, llama: Any, sites: list[FFNSite]) -> None:
        with pytest.raises(
            UnknownNameError, match=r"Unknown parameter of metric 'random' 'sed'. Did you mean 'seed'\?"
        ):
            score(llama, sites, "random", sed=1)

    def test_a_statistic_was_not_collected(self, llama: Any, sites: list[FFNSite]) -> None:
        with pytest.raises(UsageError, match=r"statistic 'act_sq' was not collected for model.layers.0.mlp"):
            score(llama, sites, "wanda")

    def test_nothing_to_score(self, llama: Any) -> None:
        with pytest.raises(UsageError, match="there is no FFN site to score"):
            score(llama, [], "random")

    def test_nan_weights(self, llama: Any, sites: list[FFNSite]) -> None:
        with torch.no_grad():
            llama.model.layers[1].mlp.up_proj.weight[3, 0] = float("nan")
        message = (
            r"metric 'magnitude' is NaN or infinite for 1 of 48 channels of model\.layers\.1\.mlp\. The weight "
            r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity: load the model again from an intact"
        )
        with pytest.raises(NonFiniteError, match=message):
            score(llama, sites, "magnitude")

    def test_a_metric_that_is_nan_by_itself_blames_no_weight(
        self, llama: Any, sites: list[FFNSite], probe_metric: Any
    ) -> None:
        with pytest.raises(NonFiniteError, match=r"'recording' is NaN or infinite for 48 of 48 channels of \S+\.$"):
            score(llama, sites, "recording", power=float("nan"))

    def test_a_core_that_is_missing(self, llama: Any, stats: dict[FFNSite, ChannelStats]) -> None:
        first = next(iter(stats))
        text = r"'supernode_protection_score' needs the supernode core of model.layers.{}.mlp: pass core=top_core"
        with pytest.raises(UsageError, match=text.format(0)):
            score(llama, stats, "supernode_protection_score")
        with pytest.raises(UsageError, match=text.format(1)):
            stats[first] = statistics_of_core(first)
            score(llama, stats, "supernode_protection_score", core={first: torch.tensor([0])})

    def test_a_reference_that_is_missing_or_another_model(self, llama: Any, sites: list[FFNSite]) -> None:
        text = r"'delta_alignment' needs the model before fine-tuning: set model.reference_id, or pass reference="
        with pytest.raises(UsageError, match=text):
            score(llama, sites, "delta_alignment")
        text = r"reference model has \(64, 32\) at model.layers.0.mlp; expected \(48, 32\). It must be the same"
        with pytest.raises(UsageError, match=text):
            score(llama, sites, "delta_alignment", reference=tiny("llama", intermediate_size=64))
        with pytest.raises(LayoutError, match=r"model.layers.0.mlp.gate_proj is not in this model"):
            score(llama, sites, "delta_alignment", reference=tiny("phi3"))

    def test_inputs_are_no_parameters(self, llama: Any, sites: list[FFNSite]) -> None:
        for name in ("supernode_protection_score", "delta_alignment"):
            assert not {"core", "reference"} & set(METRICS.get(name).params)

    def test_a_site_of_another_model(self, llama: Any, sites: list[FFNSite]) -> None:
        with pytest.raises(LayoutError, match=r"model.layers.7.mlp.gate_proj is not in this model"):
            score(llama, [replace(sites[0], path="model.layers.7.mlp")], "magnitude")


def test_infinity_in_a_buffer_is_no_broken_weight(llama: Any) -> None:
    llama.model.register_buffer("bound", torch.tensor(float("-inf")))
    assert not_finite_weight(llama) is None
    llama.model.norm.weight.data[0] = float("nan")
    assert not_finite_weight(llama) == "model.norm.weight"
