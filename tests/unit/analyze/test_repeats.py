"""A repeat against brute force: every metric on every complement, the passes, their memory, and resume."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope.analyze import repeats
from ffnscope.analyze.jackknife import document_groups
from ffnscope.analyze.levels import CoreRule, calibrate_all
from ffnscope.analyze.question import Question
from ffnscope.analyze.repeat_passes import finds_cores, interval_methods, repeat_bytes, repeat_passes
from ffnscope.analyze.repeats import Repeat, repeat_scores
from ffnscope.calibrate.collect import PassOptions, calibrate, collect, join_statistics
from ffnscope.calibrate.memory import statistics_bytes
from ffnscope.calibrate.windows import Windows, contiguous_windows
from ffnscope.errors import UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.registry import METRICS, STATISTICS, metric, statistic
from ffnscope.types import Scores
from reference import exact, padded
from tiny import D_FF, HIDDEN, LAYERS, tiny, tokens

ALL = {name: {} for name in METRICS.names() if METRICS.get(name).fn.__module__.startswith("ffnscope.")}
TEXT_FREE = {"weight_magnitude", "magnitude", "peak_to_peak", "random", "layerwise_norm"}
CORE = {"supernode_protection_score", "supernode_connectivity_score"}
MOMENTS = {"wanda": {}, "sparsegpt": {}}
RULE = CoreRule(count=3)


def text(seed: int = 0) -> Windows:
    document = torch.tensor([4, 4, 7, 9, 9, 9, 11, 12])
    return contiguous_windows(tokens(8, 12, seed), "random tokens", document)


def question(model: Any, metrics: Any = ALL) -> Question:
    reference = exact("llama", seed=7) if "delta_alignment" in metrics else None
    return Question(model, find_sites(model), metrics, RULE, reference)


def same(first: Scores, second: Scores, **tolerance: float) -> None:
    assert first.values.keys() == second.values.keys()
    for site, value in first.values.items():
        torch.testing.assert_close(value, second.values[site], **(tolerance or {"rtol": 0, "atol": 0}))


def equal(first: Repeat, second: Repeat) -> None:
    assert (first.shares, first.n_documents, first.methods) == (second.shares, second.n_documents, second.methods)
    assert len(first.without) == len(second.without)
    for a, b in zip((first.whole, *first.without), (second.whole, *second.without), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            same(a[name], b[name])


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registries that forget what a test registers."""
    for registry in (STATISTICS, METRICS):
        registry.names()
        monkeypatch.setattr(registry, "_items", dict(registry._items))


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """Statistics and number of windows of every group that is passed over."""
    seen: list[tuple[list[str], int]] = []

    def counted(model: Any, windows: Windows, statistics: Any, **kwargs: Any) -> Any:
        seen.append((list(statistics), len(windows)))
        return collect(model, windows, statistics, **kwargs)

    monkeypatch.setattr(repeats, "collect", counted)
    return seen


# --- against brute force ---


@pytest.mark.parametrize(("windows", "groups"), [(text(), 3), (padded([16, 5, 9, 2, 12]), 8)], ids=["groups", "each"])
def test_every_metric_without_a_group_is_a_calibration_on_the_others(windows: Windows, groups: int) -> None:
    """A fresh calibration on the complement, the core found anew."""
    asked = question(exact("llama"))
    found = repeat_scores(asked, windows, groups=groups, options=PassOptions(batch_size=2))
    model, sites = asked.model, asked.sites
    stats, core = calibrate_all(model, windows, ALL, sites=sites, rule=RULE)
    whole = asked.scores(stats, core)
    assert found.whole.keys() == ALL.keys()
    for name in ALL:
        same(found.whole[name], whole[name], rtol=1e-9, atol=1e-12)
    masks = document_groups(windows, groups)
    assert len(found.without) == len(masks) > 2
    for mask, without in zip(masks, found.without, strict=True):
        expected = asked.scores(*calibrate_all(model, windows[~mask], ALL, sites=sites, rule=RULE))
        assert without.keys() == ALL.keys() - TEXT_FREE
        for name, one in without.items():
            same(one, expected[name], rtol=1e-7, atol=1e-10)
            assert not all(torch.equal(one.values[s], found.whole[name].values[s]) for s in sites)


def test_the_repeat_tells_documents_and_shares() -> None:
    windows = padded([16, 5, 9, 2, 12])
    found = repeat_scores(question(tiny("llama"), {"wanda": {}}), windows, groups=4)
    assert found.n_documents == 5
    assert sorted(found.shares) == sorted([16 / 44, 12 / 44, 9 / 44, 7 / 44])


@pytest.mark.usefixtures("registries")
def test_a_core_that_would_need_another_pass_is_that_of_the_whole_text() -> None:
    @statistic("core_power", reads=("h", "core"), reduce="sum")
    def core_power(h: Tensor, core: Tensor) -> Tensor:
        """h^2 times the power of the core: one number for all of its channels."""
        return (h.square() * h[:, core].square().sum(1, keepdim=True)).sum(0)

    @metric("beside_core", needs=("core_power",), inputs=("core",))
    def beside_core(stats: Any, weights: Any, *, core: Tensor) -> Tensor:
        """Activity while the core is active."""
        return stats.mean("core_power")

    windows, model = text(), exact("llama")
    name = "supernode_protection_score"
    for rule, metrics in ((CoreRule("sparsegpt", count=3), {name: {}}), (RULE, {name: {}, "beside_core": {}})):
        assert not finds_cores(metrics, rule)
        asked = Question(model, find_sites(model), metrics, rule)
        found = repeat_scores(asked, windows, groups=3)
        assert set(found.methods.values()) == {"jackknife, fixed core"}
        _, core = calibrate_all(model, windows, metrics, sites=asked.sites, rule=rule)
        for mask, without in zip(document_groups(windows, 3), found.without, strict=True):
            passes = (calibrate(model, windows[~mask], metrics, sites=asked.sites, core=c) for c in (None, core))
            expected = asked.scores(join_statistics(*passes), core)
            for metric_name, one in without.items():
                same(one, expected[metric_name], rtol=1e-7, atol=1e-10)


def test_the_core_moves_with_the_documents() -> None:
    """What the sweeps collect is for the cores of all complements; otherwise the first test would show nothing."""
    asked = question(tiny("llama"), {"supernode_protection_score": {}})
    assert finds_cores(asked.params, RULE)
    windows = text()
    cores = [
        calibrate_all(asked.model, part, asked.params, sites=asked.sites, rule=RULE)[1]
        for part in (windows, *(windows[~mask] for mask in document_groups(windows, 3)))
    ]
    assert any(not torch.equal(core[site], cores[0][site]) for core in cores[1:] for site in asked.sites)


def test_how_intervals_are_made() -> None:
    methods = interval_methods(ALL, RULE)
    assert {name for name, how in methods.items() if how == "no text"} == TEXT_FREE
    assert {how for name, how in methods.items() if name not in TEXT_FREE} == {"jackknife"}
    fixed = interval_methods(ALL, CoreRule("sparsegpt"))
    assert {name for name, how in fixed.items() if how == "jackknife, fixed core"} == CORE
    assert interval_methods({"wanda": {}, "random": {}}, RULE, 1) == {"wanda": "one document", "random": "no text"}
    parts = {"composite": {"parts": {"random": 1.0, "magnitude": 1.0}}}
    assert interval_methods(parts, RULE) == {"composite": "no text"}


def test_one_document_is_scored_once(collected: list[Any]) -> None:
    windows = contiguous_windows(tokens(3, 12), "random tokens", torch.tensor([5, 5, 5]))
    found = repeat_scores(question(tiny("llama"), MOMENTS), windows)
    assert found.without == []
    assert (found.shares, found.n_documents) == ([1.0], 1)
    assert set(found.methods.values()) == {"one document"}
    assert collected == [(["act_sq", "h_outer"], 3), ([], 3)]


def test_metrics_that_read_no_text_run_no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    asked = question(model, {"random": {"seed": 3}, "magnitude": {}})
    monkeypatch.setattr(type(model), "forward", None)
    found = repeat_scores(asked, text())
    assert found.without == []
    assert set(found.methods.values()) == {"no text"}
    assert found.whole["random"].facts["params"] == {"seed": 3}


# --- maxima ---


@pytest.mark.usefixtures("registries")
def test_maxima_are_joined_from_the_others_or_refused() -> None:
    @statistic("top_h", reads=("h",), reduce="max")
    def top_h(h: Tensor) -> Tensor:
        """Largest h."""
        return h.amax(0)

    @statistic("top_hh", reads=("h",), reduce="max", shape=(2, "d_ff"))
    def top_hh(h: Tensor) -> Tensor:
        """Largest h and -h."""
        return torch.stack([h.amax(0), -h.amin(0)])

    @metric("top", needs=("top_h", "h_outer"))
    def top(stats: Any, weights: Any) -> Tensor:
        """A vector of maxima, beside a sum."""
        return stats.total("top_h") + 0 * stats.mean("h_outer").diagonal()

    @metric("range", needs=("top_hh", "h_outer"))
    def range_(stats: Any, weights: Any) -> Tensor:
        """A matrix of maxima, beside a sum."""
        return stats.total("top_hh").sum(0) + 0 * stats.mean("h_outer").diagonal()

    windows = text()
    asked = question(exact("llama"), {"top": {}, "range": {}})
    found = repeat_scores(asked, windows, groups=3)
    stats = calibrate(asked.model, windows, asked.params, sites=asked.sites)
    for name in asked.params:
        same(found.whole[name], asked.scores(stats, None)[name], rtol=1e-12, atol=1e-12)
    assert found.methods == {"top": "jackknife", "range": "maximum"}
    for mask, without in zip(document_groups(windows, 3), found.without, strict=True):
        rest = calibrate(asked.model, windows[~mask], asked.params, sites=asked.sites)
        assert without.keys() == {"top"}
        same(without["top"], asked.scores(rest, None)["top"], rtol=1e-12, atol=1e-12)


# --- passes and memory ---


def test_one_pass_serves_vectors_and_one_more_larger_statistics(collected: list[Any]) -> None:
    metrics = {"wanda": {}, "scar_loss_proxy": {}}
    repeat_scores(question(tiny("llama"), metrics), text(), groups=3)
    assert [statistics for statistics, _ in collected if statistics] == [["act_sq", "taylor_sq"]] * 3
    assert repeat_passes(metrics, RULE).named() == {"calibrate": ["act_sq", "taylor_sq"]}
    collected.clear()
    repeat_scores(question(tiny("llama"), MOMENTS), text(), groups=3)
    assert [statistics for statistics, _ in collected if statistics] == [["act_sq", "h_outer"]] * 3 + [["h_outer"]] * 3
    assert sum(n for statistics, n in collected if statistics) == 2 * len(text())


def test_what_needs_the_core_is_taken_again_with_the_rest(collected: list[Any]) -> None:
    metrics = {**MOMENTS, "supernode_protection_score": {}}
    repeat_scores(question(tiny("llama"), metrics), text(), groups=2)
    passes = repeat_passes(metrics, RULE).named()
    assert list(passes) == ["calibrate", "calibrate core", "leave groups out"]
    assert [statistics for statistics, _ in collected] == [s for s in passes.values() for _ in range(2)]
    assert passes["leave groups out"] == ["h_outer", "taylor_core"]


def test_the_bytes_of_a_repeat_by_hand() -> None:
    sites = find_sites(tiny("llama"))
    moments = LAYERS * 8 * D_FF * D_FF
    vectors = LAYERS * 8 * D_FF
    assert repeat_bytes(sites, repeat_passes({"wanda": {}}, RULE, 5), 3, 5) == 5 * vectors
    assert repeat_bytes(sites, repeat_passes(MOMENTS, RULE, 5), 3, 5) == 5 * vectors + 2 * moments
    passes = repeat_passes({**MOMENTS, "supernode_protection_score": {}}, RULE, 5)
    core = LAYERS * 8 * 2 * 3 * D_FF  # the cores of all groups count twice one
    assert repeat_bytes(sites, passes, 3, 5) == 5 * 3 * vectors + 2 * (moments + core)
    assert statistics_bytes(sites, ["x_outer"]) == LAYERS * 8 * HIDDEN * HIDDEN  # the unit of all this


def test_never_more_than_the_total_and_one_group_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices that are alive when the next group begins, and when scores are made."""
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []

    def note() -> None:
        places = {found.untyped_storage().data_ptr() for ref in alive if (found := ref()) is not None}
        counts.append(len(places))

    def watched(*args: Any, **kwargs: Any) -> Any:
        note()
        found = collect(*args, **kwargs)
        alive.extend(weakref.ref(v) for part in found.values() for v in part.values.values() if v.dim() > 1)
        return found

    real = Question.scores

    def scores(self: Question, *args: Any, **kwargs: Any) -> Any:
        note()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(repeats, "collect", watched)
    monkeypatch.setattr(Question, "scores", scores)
    windows = contiguous_windows(tokens(12, 12), "random tokens")
    model = tiny("llama")
    found = repeat_scores(Question(model, find_sites(model), MOMENTS), windows, groups=6)
    assert len(found.without) == 6
    assert set(counts) == {0, LAYERS, 2 * LAYERS}  # one matrix per site: the total, and one group
    assert counts.count(2 * LAYERS) == 6  # when scores without a group are made, not when the next group begins


# --- progress, resume, refusals ---


def test_progress_counts_the_tokens_of_all_passes() -> None:
    calls: list[tuple[int, int]] = []
    options = PassOptions(batch_size=1)
    asked = question(tiny("llama"), MOMENTS)
    repeat_scores(asked, text(), groups=3, options=options, on_batch=lambda *now: calls.append(now))
    assert calls == [(12 * i, 192) for i in range(1, 17)]


class Cut(Exception):
    """An interruption in the middle of a pass."""


def stop_after(batches: int) -> Callable[[int, int], None]:
    seen: Iterator[int] = iter(range(1, batches + 1))

    def on_batch(done: int, total: int) -> None:
        if next(seen) == batches:
            raise Cut

    return on_batch


@pytest.mark.parametrize("batches", range(1, 25, 3))
def test_a_resumed_repeat_is_an_unbroken_one(tmp_path: Path, batches: int) -> None:
    """8 batches of one window in each of three passes."""
    model = tiny("llama")
    asked = question(model, {**MOMENTS, "supernode_protection_score": {}, "random": {}})
    options = PassOptions(batch_size=1, checkpoint_every=1)
    unbroken = repeat_scores(asked, text(), groups=4, options=options)
    with pytest.raises(Cut):
        repeat_scores(asked, text(), groups=4, options=options, folder=tmp_path / "a", on_batch=stop_after(batches))
    calls: list[tuple[int, int]] = []
    resumed = repeat_scores(
        asked, text(), groups=4, options=options, folder=tmp_path / "a", on_batch=lambda *now: calls.append(now)
    )
    equal(resumed, unbroken)
    assert calls[-1] == (3 * 96, 3 * 96)
    assert len(calls) <= 24 - batches + 3  # a group has up to 3 windows
    tables = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert tables == [f"scores_{i}.safetensors" for i in range(5)]  # sums are gone
    equal(
        repeat_scores(asked, text(), groups=4, options=options, folder=tmp_path / "a", on_batch=stop_after(1)), resumed
    )


def test_sums_are_saved_every_so_many_windows(tmp_path: Path, collected: list[Any]) -> None:
    asked = question(tiny("llama"), MOMENTS)
    options = PassOptions(batch_size=1, checkpoint_every=4)
    with pytest.raises(Cut):
        repeat_scores(asked, text(), groups=4, options=options, folder=tmp_path, on_batch=stop_after(7))
    collected.clear()
    repeat_scores(asked, text(), groups=4, options=options, folder=tmp_path)
    first = [n for statistics, n in collected if "act_sq" in statistics]
    assert 0 < len(first) < 4 and sum(first) <= 4


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "weights": lambda c: c["model"].model.layers[0].mlp.up_proj.weight.data[0, 0].add_(1),
    "text": lambda c: c.update(windows=text(1)),
    "documents": lambda c: c.update(windows=contiguous_windows(text().input_ids, "random tokens")),
    "metrics": lambda c: c.update(metrics={"wanda": {}, "sparsegpt": {"damping": 0.1}}),
    "groups": lambda c: c.update(groups=3),
    "batch_size": lambda c: c.update(batch_size=2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_of_another_repeat_are_ignored(tmp_path: Path, change: str) -> None:
    case: dict[str, Any] = {
        "model": tiny("llama"), "windows": text(), "metrics": MOMENTS, "groups": 4, "batch_size": 1,
    }  # fmt: skip

    def run(folder: Path | None, on_batch: Any = None) -> Repeat:
        options = PassOptions(batch_size=case["batch_size"], checkpoint_every=1)
        asked = question(case["model"], case["metrics"])
        return repeat_scores(
            asked, case["windows"], groups=case["groups"], options=options, folder=folder, on_batch=on_batch
        )

    with pytest.raises(Cut):
        run(tmp_path, stop_after(12))
    CHANGES[change](case)
    calls: list[int] = []
    found = run(tmp_path, lambda done, total: calls.append(done))
    equal(found, run(None))
    assert calls[0] <= 12 * case["batch_size"]  # from the start


def test_a_choice_of_gradient_windows_is_refused() -> None:
    with pytest.raises(UsageError, match="gradient_windows = 2 chooses windows of the whole text"):
        repeat_scores(question(tiny("llama"), MOMENTS), text(), options=PassOptions(gradient_windows=2))


def test_a_checkpoint_file_is_not_used(tmp_path: Path) -> None:
    options = PassOptions(checkpoint=tmp_path / "part.safetensors", checkpoint_every=1, batch_size=1)
    assert options.checkpoint is not None
    options.checkpoint.write_text("of another pass")
    repeat_scores(question(tiny("llama"), {"wanda": {}}), text(), options=options)
    assert options.checkpoint.read_text() == "of another pass"


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    repeat_scores(question(model, {**MOMENTS, "scar_taylor": {}}), text(), groups=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.training


def test_a_gradient_length_is_used() -> None:
    asked = question(exact("llama"), {"scar_taylor": {}, "wanda": {}})
    options = PassOptions(gradient_length=6)
    found = repeat_scores(asked, text(), groups=2, options=options)
    (mask, _) = document_groups(text(), 2)
    rest = calibrate(asked.model, text()[~mask], asked.params, sites=asked.sites, options=options)
    for name in asked.params:
        same(found.without[0][name], asked.scores(rest, None)[name], rtol=1e-9, atol=1e-12)
