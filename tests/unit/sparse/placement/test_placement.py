"""The planner: its choice by brute force, the budget, and that more of it is never predicted slower."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from faults import flip_digit
from ffnscope.errors import ArtifactError, UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.io import CHECKSUM
from ffnscope.sparse.placement.machine import Machine, probe_bandwidth
from ffnscope.sparse.placement.plan import (
    Placement,
    channel_bytes,
    plan_placement,
    read_placement,
    write_placement,
)
from ffnscope.types import FFNSite
from tiny import tiny

FAST, SLOW = 1e6, 1e5


def sites(*widths):
    return [FFNSite(i, f"layers.{i}.mlp", "gate", "up", "down", 4, d_ff) for i, d_ff in enumerate(widths)]


def frequencies(*widths, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {s: torch.rand(s.d_ff, generator=random, dtype=torch.float64) ** 3 for s in sites(*widths)}


def seconds(hot, values, sizes, machine):
    """The cost by its definition."""
    total = machine.other_seconds
    for site, one in values.items():
        n_hot = sum(float(one[i]) for i in hot[site]) * sizes[site]
        n_cold = float(one.sum()) * sizes[site] - n_hot
        both = n_hot > 1e-9 and n_cold > 1e-9
        total += max(n_hot / machine.fast, n_cold / machine.slow) + machine.sync_seconds * both
    return total


@pytest.mark.parametrize("sync", [0.0, 1e-4])
@pytest.mark.parametrize("budget", [0, 24, 100, 240, 10_000])
def test_the_choice_by_brute_force(budget, sync):
    values, sizes = frequencies(5, 7), dict.fromkeys(sites(5, 7), 24)
    machine = Machine(FAST, SLOW, sync, 1e-3)
    found = plan_placement(values, sizes, budget, machine)
    ranked = sorted(((-float(v), i, c) for i, one in enumerate(values.values()) for c, v in enumerate(one)))
    times = []
    for n in range(min(12, budget // 24) + 1):
        hot = {s: [c for _, i, c in ranked[:n] if i == number] for number, s in enumerate(values)}
        times.append((seconds(hot, values, sizes, machine), n, hot))
    best = min(times, key=lambda one: one[0])
    assert {s: index.tolist() for s, index in found.hot.items()} == {s: sorted(c) for s, c in best[2].items()}
    assert found.predicted.tokens_per_second == pytest.approx(1 / best[0])
    assert found.all_slow.tokens_per_second == pytest.approx(1 / times[0][0])
    assert found.predicted.kind == "predicted"


def test_frequency_is_the_best_order_for_a_small_budget():
    """Without a bound by the fast device, no other set of channels of the same bytes is faster."""
    values, sizes = frequencies(4, 4), dict.fromkeys(sites(4, 4), 24)
    machine = Machine(1e9, SLOW)
    found = plan_placement(values, sizes, 72, machine)
    every = [(s, c) for s in values for c in range(4)]
    for chosen in itertools.combinations(every, 3):
        hot = {s: [c for t, c in chosen if t == s] for s in values}
        assert 1 / found.predicted.tokens_per_second <= seconds(hot, values, sizes, machine) * (1 + 1e-9)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.integers(0, 1000),
    st.floats(1, 1e3),
    st.floats(1, 1e3),
    st.floats(0, 1),
)
def test_invariants(widths, seed, fast, slow, sync):
    values = frequencies(*widths, seed=seed)
    sizes = {s: 8 + 4 * s.layer for s in values}
    machine, before = Machine(fast, slow, sync, 1e-3), 0.0
    for budget in range(0, 8 * sum(widths) + 64, 40):
        found = plan_placement(values, sizes, budget, machine)
        assert found.bytes <= budget
        assert found.predicted.tokens_per_second >= max(before, found.all_slow.tokens_per_second)
        before = found.predicted.tokens_per_second
        hot = torch.cat([values[s][i] for s, i in found.hot.items()])
        cold = torch.cat([values[s][~found.is_hot(s)] for s in found.hot])
        if hot.numel() and cold.numel():
            assert hot.min() >= cold.max()


def test_a_slow_fast_device_gets_nothing():
    values = frequencies(6)
    found = plan_placement(values, dict.fromkeys(values, 24), 10_000, Machine(1.0, 1e9, 1.0))
    assert found.bytes == 0 and found.predicted == found.all_slow


def test_file(tmp_path):
    values = frequencies(5, 7)
    found = plan_placement(values, dict.fromkeys(values, 24), 100, Machine(FAST, SLOW, 1e-5), {"text": "sotu"})
    path = tmp_path / "placement.json"
    write_placement(path, found)
    again = read_placement(path)
    assert all(torch.equal(again.hot[s], index) for s, index in found.hot.items())
    assert (again.budget, again.machine, again.predicted, again.all_slow) == (
        found.budget,
        found.machine,
        found.predicted,
        found.all_slow,
    )
    assert again.facts == {"text": "sotu"} and again.channel_bytes == found.channel_bytes
    whole = path.read_text()
    flip_digit(path, '"hot"')
    with pytest.raises(ArtifactError, match="is damaged: the checksum"):
        read_placement(path)
    value = {name: one for name, one in json.loads(whole).items() if name != CHECKSUM}
    value["budget"] = 1
    path.write_text(json.dumps(value))
    with pytest.raises(UsageError, match="the budget is 1"):
        read_placement(path)
    del value["machine"]
    path.write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match="'machine' is missing"):
        read_placement(path)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3"])
def test_bytes_of_a_channel(arch):
    model = tiny(arch, dtype=torch.bfloat16)
    for site in find_sites(model):
        assert channel_bytes(model, site) == (2 if site.gate is None else 3) * site.d_model * 2


def test_refusals():
    (site,) = sites(4)
    machine = Machine(FAST, SLOW)
    for values, message in (({}, "no frequencies"), ({site: torch.ones(3)}, r"must be \[4\]")):
        with pytest.raises(UsageError, match=message):
            plan_placement(values, {site: 8}, 100, machine)
    with pytest.raises(UsageError, match="numbers in"):
        plan_placement({site: torch.full((4,), 1.5)}, {site: 8}, 100, machine)
    with pytest.raises(UsageError, match="budget must be 0 or more"):
        plan_placement({site: torch.ones(4)}, {site: 8}, -1, machine)
    with pytest.raises(UsageError, match="no speed to predict"):
        plan_placement({site: torch.zeros(4)}, {site: 8}, 100, machine)
    with pytest.raises(UsageError, match="fast must be a bandwidth"):
        Machine(0, 1)
    with pytest.raises(UsageError, match="sync_seconds must be 0 or more"):
        Machine(1, 1, -1)
    speed = plan_placement({site: torch.ones(4)}, {site: 8}, 100, machine).predicted
    for index in ([2, 1], [1, 1], [4], [-1]):
        with pytest.raises(UsageError, match="hot channels of"):
            Placement({site: torch.tensor(index)}, {site: 8}, 100, machine, speed, speed)


def test_probe():
    assert 1e8 < probe_bandwidth("cpu", 2**24) < 1e13
    with pytest.raises(UsageError, match="one row of the probe"):
        probe_bandwidth("cpu", 100)
