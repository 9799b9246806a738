"""Calibration in dependency levels: with a core in one pass or in two, by the memory that it may take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ffnscope.analyze import levels
from ffnscope.analyze.levels import (
    CoreRule,
    calibrate_all,
    calibrate_at_once,
    calibration_passes,
    first_level,
    needs_core,
    takes_one_pass,
)
from ffnscope.calibrate.collect import PassOptions, calibrate, collect, join_statistics, required_statistics
from ffnscope.calibrate.windows import Windows, contiguous_windows
from ffnscope.errors import UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.plan.build import top_core
from ffnscope.registry import METRICS, STATISTICS
from ffnscope.rules import Metric, Statistic
from ffnscope.scoring import score
from reference import exact, padded
from tiny import D_FF, LAYERS, tokens

CORE = "supernode_protection_score"
TWO = PassOptions(one_pass_bytes=0)


@pytest.fixture
def text() -> Windows:
    return contiguous_windows(tokens(4, 16), "random tokens")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Keyword arguments of every pass that `calibrate_all` runs."""
    seen: list[dict[str, Any]] = []

    def counted(run: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs)
            return run(*args, **kwargs)

        return call

    for run in (calibrate, collect):
        monkeypatch.setattr(levels, run.__name__, counted(run))
    return seen


def test_what_needs_the_core() -> None:
    assert not needs_core({})
    assert not needs_core({"wanda": {}, "sparsegpt": {}, "composite": {}})
    assert needs_core({"wanda": {}, CORE: {}})


def test_the_first_level_holds_what_defines_the_core() -> None:
    rule = CoreRule("scar_taylor", params={})
    assert first_level({"wanda": {}}, rule) == {"wanda": {}}
    assert list(first_level({CORE: {}}, rule)) == [CORE, "scar_taylor"]
    asked = {CORE: {"power": 2.0}, "scar_taylor": {}}
    assert first_level(asked, rule) == asked


def test_one_pass_when_nothing_needs_the_core(llama: Any, text: Windows, passes: list[dict[str, Any]]) -> None:
    sites = find_sites(llama)
    metrics = {"wanda": {}, "scar_loss_proxy": {}}
    stats, core = calibrate_all(llama, text, metrics, sites=sites)
    assert core is None
    assert len(passes) == 1
    expected = calibrate(llama, text, metrics, sites=sites)
    for site, part in stats.items():
        assert part.counts == expected[site].counts
        assert all(torch.equal(value, expected[site].values[name]) for name, value in part.values.items())


def test_a_metric_of_weights_alone_runs_nothing(llama: Any, text: Windows) -> None:
    stats, core = calibrate_all(llama, text, {"random": {}}, sites=find_sites(llama))
    assert core is None
    assert all(not part.values for part in stats.values())


def test_two_levels_are_the_two_passes_by_hand(llama: Any, text: Windows, passes: list[dict[str, Any]]) -> None:
    sites, metrics = find_sites(llama), {CORE: {}, "wanda": {}}
    rule = CoreRule(fraction=0.1)
    stats, core = calibrate_all(llama, text, metrics, sites=sites, rule=rule, options=TWO)
    assert len(passes) == 2
    first = calibrate(llama, text, [CORE, "wanda", "scar_loss_proxy"], sites=sites)
    by_hand = top_core(score(llama, first, "scar_loss_proxy"), 0.1)
    expected = join_statistics(first, calibrate(llama, text, metrics, sites=sites, core=by_hand))
    assert core is not None
    for site in sites:
        assert core[site].tolist() == by_hand[site].tolist()
        assert core[site].numel() == round(0.1 * D_FF)
        assert stats[site].values.keys() == set(required_statistics(metrics)) == expected[site].values.keys()
        assert stats[site].counts == expected[site].counts
        for name, value in stats[site].values.items():
            assert torch.equal(value, expected[site].values[name]), name
    found = score(llama, stats, CORE, core=core)
    for site in sites:
        assert set(found.values[site].topk(core[site].numel()).indices.tolist()) == set(core[site].tolist())


@pytest.mark.parametrize("count", [1, 5, D_FF])
@pytest.mark.parametrize("options", [{}, {"gradient_windows": 2}, {"gradient_length": 7, "batch_size": 3}], ids=str)
def test_one_pass_gives_what_two_give(passes: list[dict[str, Any]], count: int, options: dict[str, Any]) -> None:
    model, windows, metrics = exact("llama"), padded([16, 3, 9, 16, 7]), {name: {} for name in METRICS.names()}
    sites, rule = find_sites(model), CoreRule(count=count)
    one, core = calibrate_all(model, windows, metrics, sites=sites, rule=rule, options=PassOptions(**options))
    assert len(passes) == 1
    two, same_core = calibrate_all(
        model, windows, metrics, sites=sites, rule=rule, options=PassOptions(**options, one_pass_bytes=0)
    )
    assert len(passes) == 3
    assert core is not None and same_core is not None
    assert all(torch.equal(core[site], same_core[site]) for site in sites)
    for site, part in two.items():
        assert (one[site].counts, one[site].reductions) == (part.counts, part.reductions)
        for name, value in part.values.items():
            assert one[site].values[name].shape == value.shape
            size = part.values["taylor_sq"].max() if name == "taylor_core" else 1e-300
            assert torch.allclose(one[site].values[name], value, rtol=1e-11, atol=1e-12 * float(size)), name
    for metric in (CORE, "supernode_connectivity_score"):
        first, second = (score(model, stats, metric, core=core) for stats in (one, two))
        assert all(torch.allclose(first.values[s], v, rtol=1e-9, atol=0) for s, v in second.values.items())


def test_when_one_pass_is_taken(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sites, rule = find_sites(llama), CoreRule()
    metrics = {CORE: {}, "wanda": {}}
    size = LAYERS * 8 * D_FF * D_FF
    enough, little = PassOptions(one_pass_bytes=size), PassOptions(one_pass_bytes=size - 1)
    assert takes_one_pass(sites, metrics, enough) and takes_one_pass(sites, metrics)
    assert not takes_one_pass(sites, metrics, little)
    assert not takes_one_pass(sites, {"wanda": {}}, enough)  # no core, no second pass
    first, second = ["taylor_sum", "taylor_sq", "act_sq"], ["taylor_core"]
    assert calibration_passes(sites, metrics, rule, little) == [first, second]
    assert calibration_passes(sites, metrics, rule, enough) == [["taylor_sum", "taylor_sq", "taylor_core", "act_sq"]]
    assert calibration_passes(sites, {"random": {}}, rule) == [[]]
    item = Statistic("whole", lambda h, core: h[:, core].sum((0, 1))[None], ("h", "core"), "sum", (1,), 1, "No axis.")
    monkeypatch.setitem(STATISTICS._items, "whole", item)
    rule_of_it = Metric("of_whole", lambda s, w, *, core: w.up.sum(1), ("whole",), "", 1, "", "", ("core",))
    monkeypatch.setitem(METRICS._items, "of_whole", rule_of_it)
    assert not takes_one_pass(sites, {"of_whole": {}, CORE: {}}, enough)  # it cannot be cut down to a core
    with pytest.raises(UsageError, match="one_pass_bytes must not be negative, 0 = never one pass; got -1"):
        PassOptions(one_pass_bytes=-1)


@pytest.mark.parametrize("batches", [1, 3])
def test_an_interrupted_single_pass_goes_on(llama: Any, text: Windows, tmp_path: Any, batches: int) -> None:
    options = PassOptions(1, checkpoint=tmp_path / "part.safetensors", checkpoint_every=1)
    sites, given = find_sites(llama), {"rule": CoreRule()}
    calls: list[int] = []

    def cut(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == batches:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_at_once(llama, text, {CORE: {}}, sites=sites, options=options, on_batch=cut, **given)
    stats, core = calibrate_at_once(llama, text, {CORE: {}}, sites=sites, options=options, on_batch=cut, **given)
    assert calls == [16, 32, 48, 64]
    assert not list(tmp_path.iterdir())
    unbroken, same = calibrate_at_once(llama, text, {CORE: {}}, sites=sites, options=PassOptions(1), **given)
    for site, part in unbroken.items():
        assert torch.equal(core[site], same[site])
        assert all(torch.equal(stats[site].values[name], value) for name, value in part.values.items())


def test_another_rule_finds_another_core(llama: Any, text: Windows) -> None:
    sites = find_sites(llama)
    rule = CoreRule("weight_magnitude", count=3)
    _, core = calibrate_all(llama, text, {CORE: {}}, sites=sites, rule=rule)
    assert core is not None
    expected = top_core(score(llama, sites, "weight_magnitude"), count=3)
    assert {s: c.tolist() for s, c in core.items()} == {s: c.tolist() for s, c in expected.items()}


def test_a_composite_defines_the_core(llama: Any, text: Windows) -> None:
    parts = {"wanda": 1.0, "scar_taylor": 0.5}
    rule = CoreRule("composite", count=2, params={"parts": parts})
    sites = find_sites(llama)
    stats, core = calibrate_all(llama, text, {CORE: {}}, sites=sites, rule=rule)
    expected = top_core(score(llama, stats, "composite", parts=parts), count=2)
    assert core is not None
    assert all(torch.equal(core[site], expected[site]) for site in sites)


def test_statistics_of_the_parts_of_a_composite_are_collected(llama: Any, text: Windows) -> None:
    metrics = {"composite": {"parts": {"activation_l2_norm": 1.0, "scar_taylor": -0.5}}}
    stats, _ = calibrate_all(llama, text, metrics, sites=find_sites(llama))
    assert all(set(part.values) == {"act_sq", "taylor_abs"} for part in stats.values())
    score(llama, stats, "composite", **metrics["composite"])


def test_each_pass_has_a_checkpoint_of_its_own(
    llama: Any, text: Windows, passes: list[dict[str, Any]], tmp_path: Any
) -> None:
    path = tmp_path / "part.safetensors"
    options = PassOptions(batch_size=1, checkpoint=path, checkpoint_every=1, one_pass_bytes=0)
    calls: list[tuple[int, int]] = []
    calibrate_all(
        llama, text, {CORE: {}}, sites=find_sites(llama), options=options, on_batch=lambda *now: calls.append(now)
    )
    assert [p["options"].checkpoint for p in passes] == [options.checkpoint, tmp_path / "core_part.safetensors"]
    assert not list(tmp_path.iterdir())
    assert calls == 2 * [(16 * i, 64) for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("batches", [2, 4, 6, 8])
def test_an_interrupt_in_either_pass_repeats_no_batch(llama: Any, text: Windows, tmp_path: Any, batches: int) -> None:
    """With checkpoints that are kept, the first pass is read when the second goes on."""
    path = tmp_path / "part.safetensors"
    options = PassOptions(1, checkpoint=path, checkpoint_every=1, keep_checkpoint=True, one_pass_bytes=0)
    sites = find_sites(llama)
    calls: list[int] = []

    def cut(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == batches:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_all(llama, text, {CORE: {}}, sites=sites, options=options, on_batch=cut)
    stats, core = calibrate_all(llama, text, {CORE: {}}, sites=sites, options=options, on_batch=cut)
    assert calls == 2 * [16, 32, 48, 64]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["core_part.safetensors", "part.safetensors"]
    whole = PassOptions(1, one_pass_bytes=0)
    unbroken, same_core = calibrate_all(llama, text, {CORE: {}}, sites=sites, options=whole)
    assert core is not None and same_core is not None
    for site in sites:
        assert torch.equal(core[site], same_core[site])
        assert all(torch.equal(value, stats[site].values[name]) for name, value in unbroken[site].values.items())


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ({"fraction": 0.0}, r"core fraction must be in \(0, 1\]"),
        ({"fraction": 1.5}, r"got 1\.5"),
        ({"count": 0}, "at least 1 channel per site; got 0"),
    ],
)
def test_an_impossible_core_is_refused_at_once(rule: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        CoreRule(**rule)


def test_a_rule_that_cannot_define_the_core(llama: Any, text: Windows, passes: list[dict[str, Any]]) -> None:
    sites = find_sites(llama)
    with pytest.raises(UsageError, match=f"'{CORE}' cannot define the core, because it itself needs the core; take"):
        calibrate_all(llama, text, {CORE: {}}, sites=sites, rule=CoreRule(CORE))
    with pytest.raises(UsageError, match="'delta_alignment' cannot define the core, because it itself needs the ref"):
        calibrate_all(llama, text, {CORE: {}}, sites=sites, rule=CoreRule("delta_alignment"))
    rule = CoreRule("composite", params={"parts": {"wanda": 1.0}})
    with pytest.raises(UsageError, match="'composite' is asked for with other parameters than those by which it def"):
        calibrate_all(llama, text, {CORE: {}, "composite": {}}, sites=sites, rule=rule)
    assert passes == []
