"""Validation: correlations of scores with measured changes, intervals, perplexities, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from ffnscope.analyze import validate as module
from ffnscope.analyze.ablation import Ablation, ablate_channels
from ffnscope.analyze.levels import CoreRule
from ffnscope.analyze.sample import ChannelSample
from ffnscope.analyze.validate import ValidationOptions, computable_metrics, rank_quality, validate
from ffnscope.calibrate.windows import Windows, contiguous_windows
from ffnscope.errors import UsageError
from ffnscope.evaluate.compare import compare_plans
from ffnscope.ffn.sites import find_sites
from ffnscope.plan.build import build_plan
from ffnscope.registry import METRICS
from ffnscope.scoring import score
from ffnscope.types import FFNSite, Scores
from tiny import tiny, tokens


def text(rows: int = 8) -> Windows:
    return contiguous_windows(tokens(rows, 16), "random tokens")


def by_hand(change: Tensor, moved: Tensor | None = None) -> tuple[Ablation, FFNSite]:
    """Changes [k, n] of the first k channels of one site; every window is a document of 10 tokens."""
    site = FFNSite(0, "layers.0.mlp", "gate", "up", "down", 8, 12)
    k, n = change.shape
    counts = torch.full((n,), 10)
    found = Ablation(
        {site: torch.arange(k)},
        {site: change},
        {site: change.abs() if moved is None else moved},
        torch.ones(n),
        counts,
        torch.arange(n),
        (),
    )
    return found, site


def windows_of(n: int) -> Windows:
    return contiguous_windows(tokens(n, 11), "by hand")


def test_correlations_pooled_and_within() -> None:
    random = torch.Generator().manual_seed(3)
    first, second = (FFNSite(i, f"layers.{i}.mlp", "gate", "up", "down", 8, 12) for i in range(2))
    index = {first: torch.tensor([1, 4, 7, 8]), second: torch.tensor([0, 2, 3, 11])}
    change = {s: torch.randn(4, 6, generator=random, dtype=torch.float64) for s in index}
    values = {s: torch.randn(12, generator=random) for s in index}
    moved = {s: v.abs() for s, v in change.items()}
    measured = Ablation(index, change, moved, torch.ones(6), torch.full((6,), 10), torch.arange(6), ())
    found = rank_quality("mine", values, measured, windows_of(6))
    picked = [values[s][index[s]] for s in index]
    for field, sums in (("loss", change), ("token", moved)):
        means = [sums[s].sum(1) / 60 for s in index]
        expected = spearmanr(torch.cat(picked), torch.cat(means)).statistic
        assert getattr(found, field).value == pytest.approx(expected)
        within = [spearmanr(p, m).statistic for p, m in zip(picked, means, strict=True)]
        assert getattr(found, f"{field}_within").value == pytest.approx(sum(within) / 2)
        low, high = getattr(found, field).interval
        assert -1 <= low <= expected <= high <= 1
        assert high - low > 0.01


def test_changes_that_agree_in_all_documents_have_a_narrow_interval() -> None:
    scale = torch.arange(1.0, 11.0, dtype=torch.float64)
    measured, site = by_hand(scale[:, None].repeat(1, 6))
    found = rank_quality("mine", {site: torch.arange(12.0)}, measured, windows_of(6))
    assert (found.loss.value, found.loss.interval) == (1.0, (1.0, 1.0))
    assert rank_quality("mine", {site: -torch.arange(12.0)}, measured, windows_of(6)).token.value == -1.0


def test_a_single_document_has_no_interval_and_constant_scores_no_correlation() -> None:
    measured, site = by_hand(torch.randn(10, 1, dtype=torch.float64))
    found = rank_quality("mine", {site: torch.arange(12.0)}, measured, windows_of(1))
    assert found.loss.value is not None and found.loss.interval is None
    flat = rank_quality("mine", {site: torch.zeros(12)}, measured, windows_of(1))
    assert flat.loss.value is flat.loss_within.value is None


@pytest.fixture
def scored(llama: Any) -> dict[str, Scores]:
    sites = find_sites(llama)
    return {name: score(llama, sites, name) for name in ("magnitude", "weight_magnitude")}


OPTIONS = ValidationOptions(ChannelSample(12, 2), (0.25, 0.5), ("local", "global"), batch_size=4)


def test_the_whole_of_it(llama: Any, scored: dict[str, Scores]) -> None:
    told: list[tuple[str, int, int]] = []
    found = validate(llama, scored, text(), options=OPTIONS, on_tokens=lambda *now: told.append(now))
    assert {one.metric for one in found.qualities} == {"magnitude", "weight_magnitude", "random"}
    assert found.qualities[-1].metric == "random"
    assert len(found.pruned) == 3 * 2 * 2
    plan = build_plan(scored["magnitude"], 0.5, "global")
    dense, row = compare_plans(llama, {"x": plan}, text(), batch_size=4)
    assert found.pruned["magnitude", "global", 0.5].results[0].value == pytest.approx(row.results[0].value)
    assert found.dense is not None and found.dense.results[0].value == pytest.approx(dense.results[0].value)
    channels = OPTIONS.sample.draw(scored["magnitude"])
    measured = ablate_channels(llama, channels, text(), batch_size=4)
    expected = rank_quality("magnitude", scored["magnitude"].values, measured, text())
    assert next(one for one in found.qualities if one.metric == "magnitude") == expected
    rows = found.rows()
    assert len(rows) == 3
    assert rows[0]["metric"] == found.qualities[0].metric
    assert rows[0]["perplexity_local_0.25"] > 1
    assert not any(isinstance(v, float) and not math.isfinite(v) for row in rows for v in row.values())
    for stage in ("ablate", "prune"):
        assert [n for s, n, t in told if s == stage][-1] == [t for s, n, t in told if s == stage][-1]


def test_between_halves_is_the_agreement_of_the_truth_with_itself(llama: Any, scored: dict[str, Scores]) -> None:
    found = validate(llama, scored, text(), options=dataclasses.replace(OPTIONS, sparsities=()))
    assert found.between_halves.token.value is not None and found.between_halves.token.value > 0.5
    assert found.pruned == {} and found.dense is None
    one = validate(llama, scored, text(1), options=dataclasses.replace(OPTIONS, sparsities=()))
    assert one.between_halves.loss.value is None


def test_it_goes_on_where_it_stopped(llama: Any, scored: dict[str, Scores], tmp_path: Path, monkeypatch: Any) -> None:
    whole = validate(llama, scored, text(), options=OPTIONS)
    real = module.compare_plans
    monkeypatch.setattr(module, "compare_plans", interrupted)
    with pytest.raises(KeyboardInterrupt):
        validate(llama, scored, text(), options=OPTIONS, folder=tmp_path)
    monkeypatch.setattr(module, "compare_plans", real)
    monkeypatch.setattr("ffnscope.analyze.ablation._losses_without", None)  # everything is in the file
    again = validate(llama, scored, text(), options=OPTIONS, folder=tmp_path)
    assert [one.metric for one in again.qualities] == [one.metric for one in whole.qualities]
    assert again.qualities[0].loss.value == pytest.approx(whole.qualities[0].loss.value)


def interrupted(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def test_what_cannot_be_computed_is_told(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = find_sites(llama)
    names, why = computable_metrics(sites, CoreRule())
    assert set(names) | set(why) == set(METRICS.names())
    assert why["delta_alignment"] == "it needs the model before fine-tuning (a reference model)"
    assert "delta_alignment" in computable_metrics(sites, CoreRule(), has_reference=True)[0]
    monkeypatch.setattr(module, "LARGE_BYTES", 10_000)
    names, why = computable_metrics(sites, CoreRule())
    assert "wanda" in names
    assert why["average_redundancy"] == "its sums take 0.0 GiB; ask for it by name"


@pytest.mark.parametrize("sparsities", [(0.0,), (1.0,), (0.3, 0.3)])
def test_refused_sparsities(sparsities: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match=r"sparsities must be distinct and in \(0, 1\)"):
        ValidationOptions(sparsities=sparsities)


def test_refused_scores(llama: Any, scored: dict[str, Scores]) -> None:
    with pytest.raises(UsageError, match="there are no scores to validate"):
        validate(llama, {}, text())
    other = score(tiny("llama"), find_sites(llama)[:1], "random")
    with pytest.raises(UsageError, match="'random' scored other FFNs than 'magnitude'"):
        validate(llama, {**scored, "random": other}, text())
