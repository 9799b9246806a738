"""How the core of a layer reaches the next one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ffnscope.analyze.cross_layer import CORE_NEEDS, NEEDS, CrossLayer, cross_layer
from ffnscope.analyze.neighbours import null_channels
from ffnscope.calibrate.collect import PassOptions, collect
from ffnscope.calibrate.windows import contiguous_windows
from ffnscope.errors import UsageError
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from reference import exact, slow_signals_of_all
from tiny import tiny, tokens
from tiny_moe import tiny_moe

CORE = torch.tensor([3, 11, 40])
TEXT = contiguous_windows(tokens(8, 16), "random tokens")
STATISTICS = ("bus_dimensions", "drive", "correlation", "redundancy")


def analysed(model: Any, **changes: Any) -> CrossLayer:
    sites = changes.pop("sites", None) or find_sites(model)
    core = {s: CORE[s.d_ff > CORE] for s in sites}
    measured = null_channels(core)
    stats = collect(model, TEXT, [*NEEDS, *CORE_NEEDS], sites=sites, core=measured, options=PassOptions(8))
    return cross_layer(model, stats, core, measured, **changes)


@pytest.fixture(scope="module")
def found() -> tuple[Any, CrossLayer]:
    model = exact("llama")
    return model, analysed(model)


def value(found: CrossLayer, statistic: str, site: str) -> float:
    return next(r["value"] for r in found.rows() if (r["statistic"], r["site"]) == (statistic, site))


def test_rows(found: Any):
    model, analysis = found
    first, second = find_sites(model)
    rows = analysis.rows()
    assert [(r["statistic"], r["site"]) for r in rows] == [
        *(("bus_dimensions", name) for name in (first.name, second.name, "all")),
        *((statistic, name) for statistic in STATISTICS[1:] for name in (first.name, "all")),
    ]
    assert {r["statistic"]: r["tail"] for r in rows} == {
        **dict.fromkeys(STATISTICS, "upper"),
        "bus_dimensions": "lower",
    }
    assert all(0 < r["p"] <= r["p_adjusted"] <= 1 and r["draws"] == 200 for r in rows)
    assert {r["next_site"] for r in rows if r["site"] == first.name} == {None, second.name}
    assert analysis.refused == {second.name: "the next layer has no single dense FFN, or there is none"}
    assert "<table>" in analysis._repr_html_()


@torch.no_grad()
def test_values_by_hand(found: Any):
    model, analysis = found
    first, second = find_sites(model)
    with torch.enable_grad():
        signals = slow_signals_of_all(model, [first, second], TEXT)
    h, next_h = signals[first]["h"], signals[second]["h"]
    power = h.square().mean(0).sqrt()
    columns = weights_of(model, first).down[:, CORE] * power[CORE]
    share = columns.abs().sum(1) / columns.abs().sum()
    assert value(analysis, "bus_dimensions", first.name) == pytest.approx(
        math.exp(-float((share * share.log()).sum())), rel=1e-6
    )
    weights, norm = weights_of(model, second), model.model.layers[1].post_attention_layernorm.weight
    rows = torch.cat([weights.gate, weights.up]) * norm
    driven = (rows / rows.norm(dim=1, keepdim=True)) @ columns
    assert value(analysis, "drive", first.name) == pytest.approx(float(driven.square().mean().sqrt()), rel=1e-5)
    rho = torch.corrcoef(torch.cat([h[:, CORE], next_h], 1).T)[:3, 3:]
    assert value(analysis, "correlation", first.name) == pytest.approx(float(rho.square().mean().sqrt()), rel=1e-6)


@torch.no_grad()
def test_units_of_channels_do_not_matter(found: Any):
    """Up rows times c and down columns over c: the same function, the same numbers."""
    _, analysis = found
    model = exact("llama")
    for site in find_sites(model):
        weights = weights_of(model, site)
        scale = torch.linspace(0.1, 10, site.d_ff, dtype=torch.float64)
        weights.up.mul_(scale[:, None])
        weights.down.div_(scale)
    for a, b in zip(analysis.rows(), analysed(model).rows(), strict=True):
        for name in ("value", "null_mean", "p"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), (a["statistic"], name)


@torch.no_grad()
def test_a_bus_is_found():
    """A core that writes to three dimensions alone is narrower than every random core."""
    model = exact("llama")
    for site in find_sites(model):
        weights_of(model, site).down[3:, CORE] = 0
    rows = [r for r in analysed(model).rows() if r["statistic"] == "bus_dimensions"]
    assert all(r["value"] <= 3.001 < r["null_low"] and r["p"] == pytest.approx(1 / 201) for r in rows)


def test_experts_and_the_last_layer_have_a_bus_alone():
    found = analysed(tiny_moe("mixtral"))
    assert {r["statistic"] for r in found.rows()} == {"bus_dimensions"}
    assert all("it is an expert" in why for why in found.refused.values())


def test_a_next_layer_that_is_not_analysed_is_named():
    model = tiny("gpt2", n_layer=3)
    first, second, last = find_sites(model)
    found = analysed(model, sites=[first, last])
    assert found.refused[first.name] == f"the FFN of the next layer, {second.name}, is not analysed"
    assert {r["statistic"] for r in found.rows()} == {"bus_dimensions"}


def test_random_cores_that_are_dead_write_nowhere():
    """A random core of dead channels has 0 dimensions, and is not lost from the p-value as NaN would be."""
    model = tiny("opt")
    for layer in model.model.decoder.layers:
        torch.nn.init.constant_(layer.fc1.bias[:30], -100.0)
    core = {s: torch.tensor([40]) for s in find_sites(model)}
    measured = null_channels(core)
    stats = collect(model, TEXT, [*NEEDS, *CORE_NEEDS], sites=list(core), core=measured, options=PassOptions(8))
    rows = [r for r in cross_layer(model, stats, core, measured).rows() if r["statistic"] == "bus_dimensions"]
    assert all(math.isfinite(r["null_mean"]) and r["null_low"] == 0 for r in rows)
    assert all(r["p"] > 0.4 for r in rows if r["site"] != "all")  # 30 of 48 channels are dead


def test_too_few_draws(llama: Any):
    with pytest.raises(UsageError, match="draws must be at least 200"):
        analysed(llama, draws=10)
