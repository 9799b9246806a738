"""An expert that no calibration token reached has no scores; it is told, and left whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ffnscope.analyze.levels import calibrate_all
from ffnscope.apply.mask import masked
from ffnscope.calibrate.collect import PassOptions, calibrate
from ffnscope.ffn.sites import find_sites
from ffnscope.io import read_scores, read_stats, write_scores, write_stats
from ffnscope.plan.build import build_plan
from ffnscope.registry import METRICS
from ffnscope.report.summary import score_summary
from ffnscope.scoring import score
from reference import padded, text
from tiny import logits
from tiny_moe import EXPERT, tiny_moe

TOLD = r"1 of 4 experts were reached by no calibration token \(model.layers.1.mlp.experts.2\), so {} cannot rank"
NAME = "model.layers.1.mlp.experts.2"


@pytest.fixture
def model() -> Any:
    """A mixture whose router never chooses expert 2."""
    found = tiny_moe("deepseek_v3")
    found.model.layers[1].mlp.gate.e_score_correction_bias[2] = -1e4
    return found


def test_statistics_are_zeros_of_count_zero(model: Any, tmp_path: Path) -> None:
    stats = calibrate(model, text(4), ["scar_loss_proxy", "wanda", "pairwise_redundancy_gaussian"])
    by_name = {s.name: part for s, part in stats.items()}
    assert set(by_name[NAME].counts.values()) == {0}
    assert not any(v.any() for v in by_name[NAME].values.values())
    assert by_name[NAME].total("h_outer").shape == (EXPERT, EXPERT)
    others = [p for n, p in by_name.items() if "experts" in n and "shared" not in n and n != NAME]
    assert sum(p.counts["act_sq"] for p in others) == 2 * 4 * 16
    write_stats(tmp_path / "stats", stats.values(), {})
    again, _ = read_stats(tmp_path / "stats")
    assert {s.name: p.counts for s, p in again.items()} == {n: p.counts for n, p in by_name.items()}


@pytest.mark.parametrize("metric", ["wanda", "scar_loss_proxy"])
@pytest.mark.parametrize("allocator", ["local", "global"])
def test_left_whole(model: Any, tmp_path: Path, metric: str, allocator: str) -> None:
    with pytest.warns(UserWarning, match=TOLD.format(metric)):
        scores = score(model, calibrate(model, text(4), [metric]), metric)
    assert scores.facts["unreached"] == [NAME]
    assert score_summary({metric: scores})[metric]["unreached"] == [NAME]
    write_scores(tmp_path / "scores", [scores], {})
    scores = read_scores(tmp_path / "scores")[0][metric]
    plan = build_plan(scores, 0.5, allocator)
    by_name = {s.name: (kept, plan.protected.get(s)) for s, kept in plan.kept.items()}
    kept, protected = by_name[NAME]
    assert kept.tolist() == list(range(EXPERT))
    assert protected is not None
    assert protected.tolist() == list(range(EXPERT))
    assert plan.provenance["unreached"] == [NAME]
    assert list(plan.kept) == list(scores.values)
    rest = {s: k for s, k in plan.kept.items() if s.name != NAME}
    assert sum(k.numel() for k in rest.values()) == sum(s.d_ff for s in rest) // 2
    with masked(model, plan):
        assert torch.isfinite(logits(model)).all()


def test_a_weight_metric_needs_no_token(model: Any) -> None:
    assert "unreached" not in score(model, find_sites(model), "weight_magnitude").facts


def test_a_plan_of_unreached_experts_alone_removes_nothing(model: Any) -> None:
    sites = find_sites(model, [NAME])
    with pytest.warns(UserWarning, match="1 of 1 experts"):
        scores = score(model, calibrate(model, text(2), ["wanda"], sites=sites), "wanda")
    assert build_plan(scores, 0.5, "global").sparsity == 0


def test_reached_by_no_gradient_window(model: Any) -> None:
    """All windows are seen forward, one backward: an expert may have activations and no gradient."""
    windows = padded([2, 16, 16, 16])
    options = PassOptions(gradient_windows=1)
    stats = calibrate(model, windows, ["wanda", "scar_loss_proxy"], options=options)
    lacking = [s.name for s, p in stats.items() if p.counts["taylor_sq"] == 0 < p.counts["act_sq"]]
    assert lacking
    with pytest.warns(UserWarning, match="experts were reached by no calibration token"):
        scores = score(model, stats, "scar_loss_proxy")
    assert set(scores.facts["unreached"]) == {*lacking, NAME}


@pytest.mark.filterwarnings("ignore:.*experts were reached by no calibration token")
@pytest.mark.filterwarnings("ignore:.*does not see all of the model")  # its attention has sinks
def test_every_metric_is_finite_however_few_tokens(model: Any) -> None:
    metrics = {name: {} for name in METRICS.names() if name != "delta_alignment"}
    stats, core = calibrate_all(model, padded([3]), metrics, sites=find_sites(model))
    for metric in metrics:
        values = score(model, stats, metric, core=core).values.values()
        assert all(bool(v.isfinite().all()) for v in values)


def test_an_interrupted_pass_goes_on(model: Any, tmp_path: Path) -> None:
    windows, options = text(8), PassOptions(batch_size=1, checkpoint=tmp_path / "part", checkpoint_every=1)
    whole = calibrate(model, windows, ["scar_loss_proxy", "flap"])

    def stop(done: int, total: int) -> None:
        if done == 3 * 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, windows, ["scar_loss_proxy", "flap"], options=options, on_batch=stop)
    resumed = calibrate(model, windows, ["scar_loss_proxy", "flap"], options=options)
    for site, part in whole.items():
        assert resumed[site].counts == part.counts
        for name, value in part.values.items():
            torch.testing.assert_close(resumed[site].values[name], value, rtol=1e-5, atol=1e-9)
