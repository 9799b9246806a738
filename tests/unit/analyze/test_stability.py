"""Stability over calibrations: sums by document, bootstrap by hand, intervals that mean what they say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope.analyze.agreement import agreement, spearman
from ffnscope.analyze.stability import (
    Stability,
    combined,
    compare_scores,
    has_intervals,
    per_document,
    stability,
    stability_rows,
)
from ffnscope.calibrate.collect import PassOptions, calibrate
from ffnscope.calibrate.windows import Windows, contiguous_windows
from ffnscope.errors import UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.registry import METRICS
from ffnscope.scoring import score
from ffnscope.types import ChannelStats, FFNSite
from reference import exact, padded
from tiny import D_FF, tokens

METRIC = "activation_l2_norm"
DOCUMENTS = torch.tensor([4, 4, 7, 9, 9, 9])


def text(seed: int = 0, rows: int = 6) -> Windows:
    document = DOCUMENTS if rows == len(DOCUMENTS) else torch.arange(rows)
    return contiguous_windows(tokens(rows, 12, seed), "random tokens", document)


@pytest.fixture
def parts() -> Callable[..., list[dict[FFNSite, ChannelStats]]]:
    """Statistics of documents whose squared activations are given, [documents, d_ff], on one site."""

    def make(act_sq: Tensor, n_tokens: Sequence[int] | None = None) -> list[dict[FFNSite, ChannelStats]]:
        site = FFNSite(0, "model.layers.0.mlp", "gate_proj", "up_proj", "down_proj", 32, act_sq.shape[1], "silu")
        counts = n_tokens or [10] * len(act_sq)
        return [
            {site: ChannelStats(site, {"act_sq": row}, {"act_sq": n}, {"act_sq": "sum"})}
            for row, n in zip(act_sq.double(), counts, strict=True)
        ]

    return make


# --- documents ---


@pytest.mark.parametrize("batch_size", [1, 4])
def test_documents_add_up_to_the_whole_calibration(batch_size: int) -> None:
    model = exact("llama")
    sites, metrics = find_sites(model), {"flap": {}, "scar_loss_proxy": {}, "llm_pruner": {}}
    options = PassOptions(batch_size=batch_size, gradient_length=8)
    found = per_document(model, text(), metrics, sites, options)
    assert len(found) == 3
    whole = calibrate(model, text(), metrics, sites=sites, options=options)
    joined = combined(found, [1, 1, 1])
    merged = found[0]
    for part in found[1:]:
        merged = {site: merged[site].merge(part[site]) for site in sites}
    for site in sites:
        assert joined[site].counts == merged[site].counts == whole[site].counts
        assert joined[site].reductions == whole[site].reductions
        for name, value in whole[site].values.items():
            torch.testing.assert_close(joined[site].values[name], value, rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(merged[site].values[name], value, rtol=1e-11, atol=1e-13)


def test_padding_of_a_document_is_not_counted() -> None:
    model = exact("llama")
    windows = padded([16, 5, 9, 2])
    sites = find_sites(model)
    found = per_document(model, windows, {METRIC: {}, "scar_taylor": {}}, sites)
    assert [part[sites[0]].counts for part in found] == [
        {"act_sq": n, "taylor_abs": n - 1} for n in windows.valid.sum(1).tolist()
    ]


def test_progress_counts_the_tokens_of_all_documents(llama: Any) -> None:
    calls: list[tuple[int, int]] = []
    per_document(llama, text(), {METRIC: {}}, find_sites(llama), None, lambda *now: calls.append(now))
    assert calls == [(24, 72), (36, 72), (72, 72)]


def test_a_checkpoint_file_is_not_used(llama: Any, tmp_path: Any) -> None:
    options = PassOptions(checkpoint=tmp_path / "part.safetensors", checkpoint_every=1, batch_size=1)
    options.checkpoint.write_text("of another pass")
    per_document(llama, text(), {METRIC: {}}, find_sites(llama), options)
    assert options.checkpoint.read_text() == "of another pass"


def test_weights_are_multiplicities(parts: Callable[..., Any]) -> None:
    documents = parts(torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]), [3, 5, 7])
    before = [{s: p.values["act_sq"].clone() for s, p in part.items()} for part in documents]
    (found,) = combined(documents, [2, 0, 1]).values()
    assert found.values["act_sq"].tolist() == [102.0, 204.0]
    assert found.counts == {"act_sq": 2 * 3 + 7}
    assert all(
        torch.equal(part[s].values["act_sq"], b[s]) for part, b in zip(documents, before, strict=True) for s in b
    )
    for weights in ([0, 0, 0], [1, 1]):
        with pytest.raises(UsageError, match="3 documents need as many weights, one of them above 0"):
            combined(documents, weights)


def test_which_metrics_have_intervals() -> None:
    without = {
        "activation_outlier_index",  # a histogram
        "rayleigh_quotient",
        "delta_alignment",
        "sparsegpt",
        "mutual_information_gaussian",
        "average_redundancy",
        "pairwise_redundancy_gaussian",
        "supernode_protection_score",
        "supernode_connectivity_score",
    }
    builtin = {n for n in METRICS.names() if METRICS.get(n).fn.__module__.startswith("ffnscope.")}
    assert {name for name in builtin if not has_intervals(name, {})} == without
    assert not has_intervals("composite", {"parts": {"wanda": 1.0, "sparsegpt": 1.0}})
    assert has_intervals("composite", {"parts": {"wanda": 1.0, "random": 1.0}})


@pytest.mark.parametrize(
    ("metric", "statistic"),
    [("sparsegpt", "h_outer"), ("activation_outlier_index", "act_hist"), ("supernode_protection_score", "taylor_core")],
)
def test_large_statistics_are_refused_before_any_forward(
    llama: Any, monkeypatch: pytest.MonkeyPatch, metric: str, statistic: str
) -> None:
    sites = find_sites(llama)
    monkeypatch.setattr(type(llama), "forward", None)
    with pytest.raises(UsageError, match=f"statistic '{statistic}' is not kept per document .* compare_scores"):
        per_document(llama, text(), {METRIC: {}, metric: {}}, sites)


def test_a_choice_of_gradient_windows_is_refused(llama: Any) -> None:
    with pytest.raises(UsageError, match="gradient_windows = 2 chooses windows of the whole text"):
        per_document(llama, text(), {METRIC: {}}, find_sites(llama), PassOptions(gradient_windows=2))


# --- values and intervals ---


def test_identical_calibrations_agree_wholly(llama: Any) -> None:
    metrics = {METRIC: {}, "scar_loss_proxy": {}, "random": {"seed": 3}}
    documents = per_document(llama, text(), metrics, find_sites(llama))
    rows = stability(llama, {"a": documents, "b": documents}, metrics, replicates=20)
    assert [row.metric for row in rows] == list(metrics)
    for row in rows:
        assert (row.value.spearman, row.value.jaccard) == (1.0, 1.0)
        assert row.documents == (3, 3)
        assert row.spearman_interval is not None and row.jaccard_interval is not None
        assert row.spearman_interval[0] <= 1.0 == row.spearman_interval[1]
        assert row.jaccard_interval[0] <= 1.0 == row.jaccard_interval[1]
    assert rows[2].spearman_interval == (1.0, 1.0)  # random does not depend on the text


def test_the_value_is_that_of_the_whole_calibrations(llama: Any) -> None:
    sites, metrics = find_sites(llama), {METRIC: {}, "composite": {"parts": {"wanda": 1.0, METRIC: 0.5}}}
    texts = {"a": text(0), "b": text(1), "c": text(2)}
    calibrations = {label: per_document(llama, windows, metrics, sites) for label, windows in texts.items()}
    rows = stability(llama, calibrations, metrics, replicates=0)
    assert [(r.metric, r.first, r.second) for r in rows] == [
        (name, *pair) for name in metrics for pair in (("a", "b"), ("a", "c"), ("b", "c"))
    ]
    stats = {label: calibrate(llama, windows, metrics, sites=sites) for label, windows in texts.items()}
    for row in rows:
        tables = (score(llama, stats[k], row.metric, **metrics[row.metric]) for k in (row.first, row.second))
        expected = agreement(*tables)
        assert row.value.spearman == pytest.approx(expected.spearman, abs=0.01)  # float32 batches may swap neighbours
        assert row.value.jaccard == expected.jaccard
        assert row.spearman_interval is row.jaccard_interval is None


def test_a_bootstrap_by_hand(llama: Any, parts: Callable[..., Any]) -> None:
    """Two documents per calibration: every replicate is one of (2, 0), (1, 1), (0, 2)."""
    random = torch.Generator().manual_seed(0)
    a, b = (torch.rand(2, D_FF, generator=random) for _ in range(2))
    (row,) = stability(llama, {"a": parts(a), "b": parts(b)}, {METRIC: {}}, replicates=40, seed=5)
    draws = []
    for i in range(2):
        drawn = torch.Generator().manual_seed(5 + i)
        draws.append([torch.randint(2, (2,), generator=drawn) for _ in range(40)])
    rows = [spearman(a[i].double().sum(0), b[j].double().sum(0)) for i, j in zip(*draws, strict=True)]
    replicates = torch.tensor([r for r in rows if r is not None], dtype=torch.float64)
    value = spearman(a.double().sum(0), b.double().sum(0))
    assert row.value.spearman == pytest.approx(value, abs=1e-12)
    low, high = torch.quantile(replicates, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    shift = value - float(replicates.mean())
    assert row.spearman_interval == pytest.approx((low + shift, high + shift), abs=1e-12)


def noisy(n: int, noise: float, random: torch.Generator) -> Tensor:
    """Squared activations [n, d_ff] of documents that differ in content: lognormal around the channel's own."""
    own = torch.exp(torch.randn(D_FF, generator=torch.Generator().manual_seed(99)))
    return own * torch.exp(noise * torch.randn(n, D_FF, generator=random))


def measured(model: Any, parts: Callable[..., Any], n: int, seed: int, noise: float = 2.0) -> Stability:
    random = torch.Generator().manual_seed(seed)
    calibrations = {label: parts(noisy(n, noise, random)) for label in ("a", "b")}
    (row,) = stability(model, calibrations, {METRIC: {}}, replicates=60, seed=seed)
    return row


def test_intervals_hold_the_value_and_shrink_with_more_documents(llama: Any, parts: Callable[..., Any]) -> None:
    widths = {}
    for n in (8, 128):
        rows = [measured(llama, parts, n, seed) for seed in range(4)]
        for row in rows:
            assert row.spearman_interval is not None and row.jaccard_interval is not None
            assert -1 <= row.spearman_interval[0] <= row.value.spearman <= row.spearman_interval[1] <= 1
            assert 0 <= row.jaccard_interval[0] <= row.value.jaccard <= row.jaccard_interval[1] <= 1
        widths[n] = sum(r.spearman_interval[1] - r.spearman_interval[0] for r in rows) / len(rows)
    assert widths[128] < 0.6 * widths[8]


def test_intervals_cover_the_agreement_of_fresh_calibrations(llama: Any, parts: Callable[..., Any]) -> None:
    """The plain percentiles of the replicates would miss it nearly always: resampled documents agree less."""
    n, random = 16, torch.Generator().manual_seed(1)
    fresh = [spearman(noisy(n, 2.0, random).sum(0), noisy(n, 2.0, random).sum(0)) for _ in range(300)]
    truth = sum(fresh) / len(fresh)
    rows = [measured(llama, parts, n, seed) for seed in range(30)]
    covered = sum(r.spearman_interval[0] <= truth <= r.spearman_interval[1] for r in rows)
    assert covered >= 25


def test_seeds_reproduce(llama: Any, parts: Callable[..., Any]) -> None:
    random = torch.Generator().manual_seed(0)
    calibrations = {label: parts(noisy(6, 1.0, random)) for label in ("a", "b")}
    rows = [stability(llama, calibrations, {METRIC: {}}, replicates=30, seed=seed)[0] for seed in (7, 7, 8)]
    assert rows[0] == rows[1]
    assert rows[0].value == rows[2].value
    assert rows[0].spearman_interval != rows[2].spearman_interval


def test_one_document_has_no_interval(llama: Any, parts: Callable[..., Any]) -> None:
    random = torch.Generator().manual_seed(0)
    calibrations = {"a": parts(noisy(1, 1.0, random)), "b": parts(noisy(5, 1.0, random))}
    (row,) = stability(llama, calibrations, {METRIC: {}}, replicates=10)
    assert row.spearman_interval is row.jaccard_interval is None
    assert row.documents == (1, 5)


def test_no_replicates_and_constant_scores_have_no_interval(llama: Any, parts: Callable[..., Any]) -> None:
    calibrations = {"a": parts(torch.ones(3, D_FF)), "b": parts(torch.ones(3, D_FF))}
    (row,) = stability(llama, calibrations, {METRIC: {}}, replicates=5)
    assert row.value.spearman is row.spearman_interval is None
    assert row.jaccard_interval == (1.0, 1.0)


def test_refusals(llama: Any, parts: Callable[..., Any]) -> None:
    documents = parts(torch.rand(2, D_FF))
    with pytest.raises(UsageError, match="needs at least two calibrations: other seeds, or other texts"):
        stability(llama, {"a": documents}, {METRIC: {}})
    with pytest.raises(UsageError, match="calibration 'b' holds no document"):
        stability(llama, {"a": documents, "b": []}, {METRIC: {}})
    with pytest.raises(UsageError, match="replicates must be at least 0"):
        stability(llama, {"a": documents, "b": documents}, {METRIC: {}}, replicates=-1)
    with pytest.raises(UsageError, match="'sparsegpt' cannot be scored from statistics per document"):
        stability(llama, {"a": documents, "b": documents}, {METRIC: {}, "sparsegpt": {}})


# --- by value ---


def test_second_moments_are_compared_by_value(llama: Any) -> None:
    sites = find_sites(llama)
    tables = {
        str(seed): score(llama, calibrate(llama, text(seed), ["sparsegpt"], sites=sites), "sparsegpt")
        for seed in range(3)
    }
    rows = compare_scores(tables, {"0": 3, "1": 3, "2": 4})
    assert [(r.first, r.second, r.documents) for r in rows] == [
        ("0", "1", (3, 3)),
        ("0", "2", (3, 4)),
        ("1", "2", (3, 4)),
    ]
    for row in rows:
        assert row.value == agreement(tables[row.first], tables[row.second])
        assert row.spearman_interval is row.jaccard_interval is None
    with pytest.raises(UsageError, match="at least two calibrations"):
        compare_scores({"0": tables["0"]}, {"0": 3})
    other = dataclasses.replace(tables["1"], metric="flap")
    with pytest.raises(UsageError, match="the tables hold different metrics: flap, sparsegpt"):
        compare_scores({"0": tables["0"], "1": other}, {"0": 3, "1": 3})


def test_rows_for_csv_and_json(llama: Any, parts: Callable[..., Any]) -> None:
    documents = parts(torch.rand(4, D_FF, generator=torch.Generator().manual_seed(0)))
    found = stability(llama, {"a": documents, "b": documents}, {METRIC: {}}, replicates=5)
    found += stability(llama, {"a": documents, "b": documents}, {METRIC: {}}, replicates=0)
    first, second = stability_rows(found)
    assert list(first) == [
        *("metric", "first", "second", "spearman", "spearman_low", "spearman_high"),
        *("top1_jaccard", "top1_jaccard_low", "top1_jaccard_high", "documents_first", "documents_second"),
    ]
    assert list(second) == list(first)
    assert (first["spearman"], first["spearman_high"], first["documents_second"]) == (1.0, 1.0, 4)
    assert second["spearman_low"] is second["top1_jaccard_high"] is None
