"""Passes that need the supernode core, how they are joined with the first pass, and the memory of sums."""

from __future__ import annotations

import pytest
import torch

from ffnscope.calibrate.accumulate import Accumulator
from ffnscope.calibrate.collect import (
    PassOptions,
    calibrate,
    join_statistics,
    required_statistics,
)
from ffnscope.calibrate.memory import statistics_bytes
from ffnscope.errors import UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.registry import METRICS
from ffnscope.scoring import score
from reference import CORE, calibrate_in_two, exact, of_ffns, padded, some_core, text
from tiny import tiny

ALL = METRICS.names()


class Cut(Exception):
    """An interruption in the middle of a pass."""


def stop_after(steps):
    seen: list[int] = []

    def on_batch(done, total):
        seen.append(done)
        if len(seen) == steps:
            raise Cut

    return on_batch


def equal(first, second):
    def same(a, b):
        return a.counts == b.counts and all(torch.equal(v, b.values[n]) for n, v in a.values.items())

    return first.keys() == second.keys() and all(same(part, second[site]) for site, part in first.items())


def test_levels_of_statistics():
    names = ["supernode_protection_score", "wanda"]
    assert required_statistics(names) == ["taylor_sum", "taylor_sq", "taylor_core", "act_sq"]
    assert required_statistics(names, core=False) == ["taylor_sum", "taylor_sq", "act_sq"]
    assert required_statistics(names, core=True) == ["taylor_core"]
    model = tiny("llama")
    core = some_core(find_sites(model))
    assert {tuple(p.values) for p in calibrate(model, text(2), names).values()} == {
        ("act_sq", "taylor_sum", "taylor_sq")
    }
    second = calibrate(model, text(2), names, core=core)
    assert {tuple(p.values) for p in second.values()} == {("taylor_core",)}
    assert {tuple(p.total("taylor_core").shape) for p in second.values()} == {(3, 48)}
    model.model.layers[0].mlp.register_forward_pre_hook(lambda m, args: pytest.fail("the model was run"))
    empty = calibrate(model, text(2), ["wanda"], core=core, sites=list(core))
    assert {len(p.values) for p in empty.values()} == {0}


def test_both_passes_see_the_same_gradients():
    """With any options: the entry of a core channel with itself is its sum of (h g)^2."""
    model = exact("gpt2")
    core = some_core(find_sites(model))
    for changes in ({}, {"gradient_windows": 2}, {"gradient_length": 9}, {"gradient_windows": 3, "gradient_length": 5}):
        found = calibrate_in_two(model, padded([16, 4, 9, 12, 16]), core, batch_size=2, **changes)
        for part in of_ffns(found).values():
            own = part.total("taylor_core")[torch.arange(3), CORE]
            assert torch.allclose(own, part.total("taylor_sq")[CORE], rtol=1e-10)
            assert part.counts["taylor_core"] == part.counts["taylor_sq"]
        score(model, found, "supernode_connectivity_score", core=core)


def test_joins():
    model = tiny("llama")
    sites = find_sites(model)
    core = some_core(sites)
    names = ["supernode_protection_score"]
    first, second = calibrate(model, text(3), names), calibrate(model, text(3), names, core=core)
    joined = join_statistics(first, second)
    for site, part in joined.items():
        assert {*part.values} == {"taylor_sum", "taylor_sq", "taylor_core"}
        assert part.values["taylor_sq"] is first[site].values["taylor_sq"]
        assert {*part.counts.values()} == {45}
    with pytest.raises(UsageError, match=r"two passes that both collected 'taylor_sq' of model.layers.0.mlp"):
        join_statistics(first, first)
    with pytest.raises(UsageError, match="two passes over different sites; calibrate both for the same"):
        join_statistics(first, {sites[0]: second[sites[0]]})
    shorter = calibrate(model, text(2), names, core=core)
    with pytest.raises(UsageError, match=r"gradients of 30 and 45 predicted tokens of model.layers.0.mlp"):
        join_statistics(first, shorter)
    forward = calibrate(model, text(2), ["wanda"])
    assert {*join_statistics(forward, shorter)[sites[0]].values} == {"act_sq", "taylor_core"}


@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_pass_of_the_core(tmp_path, step):
    model = tiny("llama")
    core = some_core(find_sites(model))
    file = tmp_path / "pass.safetensors"
    saved = PassOptions(batch_size=1, checkpoint=file, checkpoint_every=1)
    unbroken = calibrate(model, text(6), ALL, core=core, options=PassOptions(batch_size=1))
    with pytest.raises(Cut):
        calibrate(model, text(6), ALL, core=core, options=saved, on_batch=stop_after(step))
    seen = []
    resumed = calibrate(model, text(6), ALL, core=core, options=saved, on_batch=lambda d, t: seen.append(d))
    assert len(seen) == 6 - step
    assert equal(resumed, unbroken)
    # another core is another pass
    with pytest.raises(Cut):
        calibrate(model, text(6), ALL, core=core, options=saved, on_batch=stop_after(step))
    other = {s: torch.tensor([3, 11, 41]) for s in core}
    seen.clear()
    found = calibrate(model, text(6), ALL, core=other, options=saved, on_batch=lambda d, t: seen.append(d))
    assert len(seen) == 6
    assert equal(found, calibrate(model, text(6), ALL, core=other, options=PassOptions(batch_size=1)))


@pytest.mark.parametrize(
    ("core", "text_of_error"),
    [
        (
            torch.tensor([0, 48]),
            r"core of model.layers.0.mlp: channels must be unique and in \[0, 48\); got 2 from",
        ),
        (torch.tensor([-1]), r"channels must be unique and in \[0, 48\); got 1 from -1 to -1"),
        (torch.tensor([3, 3]), r"channels must be unique and in \[0, 48\); got 2 from 3 to 3"),
        (
            torch.tensor([], dtype=torch.int64),
            r"expected a one-dimensional, non-empty int64 index; got torch.int64 \(0,\)",
        ),
        (torch.tensor([1.0]), r"expected a one-dimensional, non-empty int64 index; got torch.float32 \(1,\)"),
        (torch.ones(48, dtype=torch.bool), r"non-empty int64 index; got torch.bool \(48,\)"),
        (torch.tensor([[1]]), r"non-empty int64 index; got torch.int64 \(1, 1\)"),
    ],
    ids=str,
)
def test_impossible_cores(core, text_of_error):
    model = tiny("llama")
    sites = find_sites(model)
    with pytest.raises(UsageError, match=text_of_error):
        calibrate(model, text(1), ALL, core=dict.fromkeys(sites, core))
    stats = calibrate_in_two(model, text(1), some_core(sites))
    with pytest.raises(UsageError, match=text_of_error):
        score(model, stats, "supernode_protection_score", core=dict.fromkeys(sites, core))


def test_a_site_without_core():
    model = tiny("llama")
    first, second = find_sites(model)
    text_of_error = (
        r"'taylor_core' reads the supernode core, which is not known for model.layers.1.mlp.*pass core=top_core"
    )
    with pytest.raises(UsageError, match=text_of_error):
        calibrate(model, text(1), ALL, core={first: CORE})
    found = calibrate(model, text(1), ALL, core={first: CORE}, sites=[first])
    assert list(found) == [first] != [second]


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_sums_take_exactly_the_announced_memory(arch):
    model = tiny(arch)
    core = some_core(find_sites(model))
    found = calibrate_in_two(model, text(3), core)
    used = sum(v.untyped_storage().nbytes() for p in found.values() for v in p.values.values())
    assert used == statistics_bytes(list(found), required_statistics(ALL), core_size=3)
    # sums of x, its squares (two) and those of y (two), x_outer, dy_outer; xh; 8 vectors of channels; h_outer; core;
    # histogram
    ffns = 2 * (8 * (5 * 32 + 2 * 32 * 32 + 32 * 48 + 8 * 48 + 48 * 48 + 3 * 48) + 4 * 128 * 48)
    # two attentions with x_sq, y_sq and stream_sq; stream_sq of five cuts and of what the LM head reads
    assert used == ffns + 8 * 32 * (2 * 3 + 5 + 1)


def test_the_result_is_not_copied(monkeypatch):
    """The sums are large where they are matrices: the pass hands them over."""
    kept = []
    result = Accumulator.result

    def watched(self, **options):
        kept.append({v.data_ptr() for v in self.sums.values.values()})
        return result(self, **options)

    monkeypatch.setattr(Accumulator, "result", watched)
    found = calibrate(tiny("llama"), text(3), ["average_redundancy"])
    assert [{v.data_ptr() for p in found.values() for v in p.values.values()}] == kept
