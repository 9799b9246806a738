"""Write halo and read halo against null cores and matched channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope.analyze.halo import CORE_NEEDS, NEEDS, HaloAnalysis, HaloOptions, halo_analysis
from ffnscope.analyze.halo_draws import (
    CORE_NULLS,
    Followers,
    HaloSize,
    halo_values,
    lp_matched_sets,
    matched_values,
    null_cores,
)
from ffnscope.analyze.neighbours import bounded_pool, null_channels
from ffnscope.analyze.nulls import compare
from ffnscope.calibrate.collect import PassOptions, collect
from ffnscope.calibrate.windows import Windows, contiguous_windows
from ffnscope.errors import UsageError
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.metrics.supernode import connectivity, redundancy_to_core, write_halo
from ffnscope.types import ChannelStats, FFNSite, FFNWeights
from reference import exact, slow_signals_of_all
from tiny import D_FF, LAYERS, tiny, tokens
from tiny_moe import tiny_moe

NULLS = ["random_core", "degree_matched", "norm_matched", "lp_matched"]
CORE = torch.tensor([3, 11, 40])


def text(rows: int = 8) -> Windows:
    return contiguous_windows(tokens(rows, 16), "random tokens")


def measured_stats(model: Any, windows: Windows, core: Any, pool: int | None = None) -> tuple[Any, Any]:
    measured = null_channels(core, pool)
    names = [*NEEDS, *CORE_NEEDS]
    return collect(model, windows, names, sites=list(core), core=measured, options=PassOptions(8)), measured


@pytest.fixture(scope="module")
def found() -> tuple[Any, HaloAnalysis, dict[FFNSite, ChannelStats]]:
    model = exact("llama", num_hidden_layers=3)
    core = dict.fromkeys(find_sites(model), CORE)
    stats, measured = measured_stats(model, text(), core)
    return model, halo_analysis(model, stats, core, measured, HaloOptions(support=8)), stats


def test_rows_of_every_halo_and_null(found: Any):
    model, analysis, _ = found
    rows = analysis.rows()
    sites = [s.name for s in find_sites(model)]
    for halo, names in (("write", [*sites, "all"]), ("read", [*sites[:-1], "all"])):
        for null in NULLS:
            for statistic in ("redundancy", "excess"):
                here = [r for r in rows if (r["halo"], r["null"], r["statistic"]) == (halo, null, statistic)]
                assert [r["site"] for r in here] == names
                assert here[-1]["value"] == pytest.approx(sum(r["value"] for r in here[:-1]) / (len(here) - 1))
                assert all(0 < r["p"] <= r["p_adjusted"] <= 1 and r["draws"] == 200 for r in here)
                assert all(r["null_low"] <= r["null_mean"] <= r["null_high"] and r["null_sd"] > 0 for r in here)
    assert {r["tokens"] for r in rows} == {text().n_targets}
    shared = {r["null_overlap"] for r in rows if r["null"] == "random_core"}
    assert all(share == pytest.approx(len(CORE) / D_FF, abs=0.03) for share in shared)  # all channels are measured
    assert analysis.refused == {f"{sites[-1]} read": "the next layer has no single dense FFN, or there is none"}
    assert "<table>" in analysis._repr_html_()


def test_the_write_halo_and_its_redundancy_are_those_of_the_metric(found: Any):
    model, analysis, stats = found
    for site in find_sites(model):
        weights = weights_of(model, site)
        halo = write_halo(connectivity(weights, CORE, 8), CORE, 0.1)
        assert analysis.write_halo[site].tolist() == halo.tolist()
        part = stats[site]
        of_core = {**part.values, "taylor_core": part.values["taylor_core"][torch.isin(torch.arange(D_FF), CORE)]}
        redundancy = redundancy_to_core(ChannelStats(site, of_core, part.counts, part.reductions), CORE)
        row = next(r for r in analysis.rows() if r["site"] == site.name and r["statistic"] == "redundancy")
        assert row["value"] == pytest.approx(float(redundancy[halo].mean()), rel=1e-9)
        excess = next(r for r in analysis.rows() if r["site"] == site.name and r["statistic"] == "excess")
        others = [i for i in range(D_FF) if i not in halo.tolist() and i not in CORE.tolist()]
        assert excess["value"] == pytest.approx(float(redundancy[halo].mean() - redundancy[others].mean()), rel=1e-7)


def test_the_read_halo_by_hand(found: Any):
    """Channels of the next FFN by their share of |W_gate| + |W_up| in the core's dimensions, through the norm."""
    model, analysis, _ = found
    first, second, _ = find_sites(model)
    weights, following = weights_of(model, first), weights_of(model, second)
    main = weights.down.abs()[:, CORE].sum(1).topk(8).indices
    norm = model.model.layers[1].post_attention_layernorm.weight
    read = (following.gate.abs() + following.up.abs()) * norm.abs()
    halo = (read[:, main].sum(1) / read.sum(1)).topk(round(0.1 * D_FF)).indices
    assert analysis.read_halo[first].tolist() == halo.sort().values.tolist()
    assert analysis.next_sites[first] == second
    signals = slow_signals_of_all(model, [first, second], text())
    q, next_q = (signals[s]["h"] * signals[s]["g"] for s in (first, second))
    predicted = torch.arange(len(q)) % 16 != 15  # the last of a window predicts nothing: its q is 0
    together = torch.cat([q[predicted][:, CORE], next_q[predicted][:, halo]], 1)
    rho = torch.corrcoef(together.T)[:3, 3:].clamp_min(0)
    expected = (-0.5 * torch.log1p(-rho.square())).mean()
    row = next(r for r in analysis.rows() if r["halo"] == "read" and r["site"] == first.name)
    assert row["value"] == pytest.approx(float(expected), rel=1e-6)


def test_the_scale_of_the_loss_does_not_matter(found: Any):
    """The published code adds 1e-8 to products of variances; here redundancy is a correlation."""
    model, analysis, stats = found
    scaled: dict[FFNSite, ChannelStats] = {}
    for site, part in stats.items():
        power = {"taylor_sum": 1e-9, "taylor_sq": 1e-18, "taylor_core": 1e-18, "taylor_next": 1e-18}
        scaled[site] = ChannelStats(
            site, {n: v * power[n] for n, v in part.values.items()}, part.counts, part.reductions
        )
    core = dict.fromkeys(find_sites(model), CORE)
    again = halo_analysis(model, scaled, core, null_channels(core), HaloOptions(support=8))
    for a, b in zip(analysis.rows(), again.rows(), strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-6) and a["p"] == pytest.approx(b["p"], abs=0.011)


def test_one_core_alone_is_one_of_many(found: Any):
    random = torch.Generator().manual_seed(0)
    followers = Followers(
        torch.rand(7, 20, generator=random), torch.rand(20, 6, generator=random), torch.ones(20), torch.arange(7)
    )
    cores, written = torch.tensor([[0, 2], [3, 6], [1, 5]]), followers.sizes[:7]
    size = HaloSize(0.2, 2, 5)
    every = halo_values(followers, cores, written, size)[0]
    alone = torch.cat([halo_values(followers, core[None], written, size)[0] for core in cores])
    assert torch.equal(every, alone)


def test_p_values_are_uniform_when_the_core_is_any_set():
    """Cores drawn at random from random weights and signals are like their null cores."""
    model, p = tiny("llama"), []
    windows = text(8)
    sites = find_sites(model)
    for seed in range(30):
        random = torch.Generator().manual_seed(seed)
        core = {s: torch.randperm(D_FF, generator=random)[:4].sort().values for s in sites}
        stats, measured = measured_stats(model, windows, core)
        rows = halo_analysis(model, stats, core, measured, HaloOptions(support=8, seed=seed)).rows()
        p += [r["p"] for r in rows if r["null"] == "random_core" and r["statistic"] == "excess" and r["site"] != "all"]
    values = torch.tensor(p)
    assert values.numel() == 30 * (2 * LAYERS - 1)
    for level in (0.25, 0.5, 0.75):
        assert float((values <= level).double().mean()) == pytest.approx(level, abs=0.15)
    assert float((values <= 0.05).double().mean()) < 0.15


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.5])
def test_p_values_against_lp_matched_followers_hold_their_level(fraction: float):
    """A halo that is any set of followers: 5 % of its p-values are below 0.05, also of a halo of one half."""
    p: list[float] = []
    for seed in range(300):
        random = torch.Generator().manual_seed(seed)
        correlation, sizes = torch.rand(4, 100, generator=random), torch.rand(100, 6, generator=random)
        power, at = torch.rand(100, generator=random).exp(), torch.arange(4)
        followers = Followers(0.8 * correlation, sizes, power, at)
        values, halo, redundancy = halo_values(followers, at[None], sizes[:4], HaloSize(fraction, 2, 5))
        sets = lp_matched_sets(followers, at, halo, 200, random)
        assert not bool(torch.isin(sets, at).any())
        p.append(compare(float(values[0, 1]), matched_values(followers, at, redundancy, sets)[:, 1]).p)
    below = (torch.tensor(p) <= 0.05).double().mean()
    assert 0.015 <= float(below) <= 0.085  # 2.8 standard errors around 0.05


@pytest.mark.parametrize("null", CORE_NULLS)
def test_p_values_against_null_cores_hold_their_level_with_a_small_pool(null: str):
    """Two measured channels per core channel: null cores drawn from these alone would differ too little."""
    p: list[float] = []
    for seed in range(300):
        random = torch.Generator().manual_seed(seed)
        down, number = torch.randn(16, 60, generator=random), torch.rand(60, generator=random)
        measured, core = torch.arange(60), torch.randperm(60, generator=random)[:20].sort().values
        conn = torch.rand(60, generator=random)
        weights = FFNWeights(None, down.T.contiguous(), down)
        places = null_cores(weights, core, measured, conn, 200, random)[null]
        p.append(compare(float(number[core].mean()), number[places].mean(1)).p)
    below = (torch.tensor(p) <= 0.05).double().mean()
    assert 0.015 <= float(below) <= 0.085


def test_a_planted_halo_is_found():
    """Followers that write with the core and repeat its q stand out against every null."""
    random = torch.Generator().manual_seed(0)
    n, d_model, k = 200, 40, 4
    sizes = torch.rand(n, d_model, generator=random) + 0.1
    sizes[: k + 20, :5] += 5
    q = torch.randn(3000, n, generator=random, dtype=torch.float64)
    q[:, k : k + 20] += q[:, :k].repeat(1, 5)
    followers = Followers(torch.corrcoef(q.T), sizes, q.square().mean(0), torch.arange(n))
    size = HaloSize(20 / 196, 5, 5)
    values, halo, _ = halo_values(followers, torch.arange(k)[None], sizes, size)
    assert halo.tolist() == list(range(k, k + 20))
    nulls: Tensor = torch.stack([24 + torch.randperm(n - 24, generator=random)[:k] for _ in range(200)])
    drawn = halo_values(followers, nulls, sizes, size)[0]
    assert bool((drawn < values).all())


def test_few_tokens_are_warned_of(llama: Any):
    core = {s: torch.arange(6) for s in find_sites(llama)}
    stats, measured = measured_stats(llama, text(2), core)
    with pytest.warns(UserWarning, match=r"rest on 30 tokens for 6 core channels \(and 1 more FFNs have as few\)"):
        found = halo_analysis(llama, stats, core, measured, HaloOptions(support=8))
    assert found.few_tokens == {s.name: 30 for s in core}


@pytest.mark.filterwarnings("ignore:correlations with the core")
def test_an_expert_has_a_write_halo_alone():
    model = tiny_moe("mixtral")
    core = {s: torch.tensor([0, 1]) for s in find_sites(model)}
    stats, measured = measured_stats(model, text(), core)
    found = halo_analysis(model, stats, core, measured, HaloOptions(support=8))
    assert set(found.write_halo) == set(core) and found.read_halo == {}
    assert {r["halo"] for r in found.rows()} == {"write"}
    assert all("it is an expert" in why for why in found.refused.values()) and len(found.refused) == len(core)


def test_a_plain_ffn_has_both():
    model = tiny("gpt2")
    core = dict.fromkeys(find_sites(model), CORE)
    stats, measured = measured_stats(model, text(), core)
    found = halo_analysis(model, stats, core, measured, HaloOptions(support=8))
    assert len(found.write_halo) == LAYERS and len(found.read_halo) == LAYERS - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 100}, "draws must be at least 200"),
        ({"fraction": 0.6}, r"the halo must be a share in \(0, 0.5\] of the channels"),
        ({"fraction": 0.0}, "got 0"),
        ({"support": 0}, "support and top must be at least 1; got 0 and 5"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        HaloOptions(**options)


def test_what_was_not_measured_is_refused(llama: Any):
    core = dict.fromkeys(find_sites(llama), CORE)
    stats, measured = measured_stats(llama, text(), core)
    other = {s: torch.tensor([0]) for s in core}
    narrow = {s: i[~torch.isin(i, torch.tensor([0]))] for s, i in measured.items()}
    with pytest.raises(UsageError, match="correlations were not measured for all channels of the core"):
        halo_analysis(llama, stats, other, narrow, HaloOptions(support=8))
    few_stats, few = measured_stats(llama, text(), core, pool=2)
    with pytest.raises(UsageError, match="null cores of 3 channels need as many others that are measured; got 2"):
        halo_analysis(llama, few_stats, core, few, HaloOptions(support=8))


def test_the_pool_holds_the_core_and_others(site: FFNSite, monkeypatch: pytest.MonkeyPatch):
    wide = [FFNSite(i, f"layers.{i}.mlp", "g", "u", "d", 4, 2000) for i in range(2)]
    core = {s: torch.tensor([5, 17, 1999]) for s in wide}
    for pool, size in ((None, 103), (20, 23), (5000, 2000)):
        for index in null_channels(core, pool).values():
            assert index.numel() == size and torch.equal(index, index.unique())
            assert bool(torch.isin(core[wide[0]], index).all())
    assert bounded_pool(wide, ["taylor_core"], 20) == 200
    assert bounded_pool(wide, ["taylor_core"], 20, 27) == 27
    row = 2 * 2000 * 8
    monkeypatch.setattr("ffnscope.analyze.neighbours.POOL_BYTES", 70 * row)
    assert bounded_pool(wide, ["taylor_core"], 20) == 50
    monkeypatch.setattr("ffnscope.analyze.neighbours.POOL_BYTES", 40 * row)
    with pytest.raises(UsageError, match=r"null cores of 20 channels need sums of .* GiB for 2 FFNs"):
        bounded_pool(wide, ["taylor_core"], 20)
