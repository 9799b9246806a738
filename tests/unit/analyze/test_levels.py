"""Calibration in dependency levels: two passes exactly when a metric needs the core."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ffnscope.analyze import levels
from ffnscope.analyze.levels import CoreRule, calibrate_all, first_level, needs_core
from ffnscope.calibrate.collect import PassOptions, calibrate, join_statistics, required_statistics
from ffnscope.calibrate.windows import Windows, contiguous_windows
from ffnscope.errors import UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.plan.build import top_core
from ffnscope.scoring import score
from tiny import D_FF, tokens

CORE = "supernode_protection_score"


@pytest.fixture
def text() -> Windows:
    return contiguous_windows(tokens(4, 16), "random tokens")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Keyword arguments of every pass that `calibrate_all` runs."""
    seen: list[dict[str, Any]] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return calibrate(*args, **kwargs)

    monkeypatch.setattr(levels, "calibrate", counted)
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
    stats, core = calibrate_all(llama, text, metrics, sites=sites, rule=rule)
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
    options = PassOptions(batch_size=1, checkpoint=tmp_path / "part.safetensors", checkpoint_every=1)
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
    options = PassOptions(1, checkpoint=tmp_path / "part.safetensors", checkpoint_every=1, keep_checkpoint=True)
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
    unbroken, same_core = calibrate_all(llama, text, {CORE: {}}, sites=sites, options=PassOptions(1))
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
