"""Loss curves equal what whole forwards of the cut model give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ffnscope.analyze.curves import CurveOptions, measure_curves
from ffnscope.apply.one_shot import reconstruct
from ffnscope.apply.reconstruction import Reconstruction, reconstructed
from ffnscope.calibrate.collect import collect
from ffnscope.calibrate.windows import Windows, contiguous_windows
from ffnscope.errors import UsageError
from ffnscope.evaluate.fidelity import fidelity
from ffnscope.evaluate.forward import batch_logits
from ffnscope.ffn.sites import find_sites
from ffnscope.plan.build import build_plan
from ffnscope.scoring import score
from ffnscope.types import Budget, FFNSite, PruningPlan, Scores
from tiny import tiny, tokens
from tiny_moe import tiny_moe


def windows(rows: int = 5, length: int = 12) -> Windows:
    return contiguous_windows(tokens(rows, length), "random tokens")


def model_of(name: str) -> Any:
    return (tiny_moe if name == "mixtral" else tiny)(name, dtype=torch.float64)


def scores_of(model: Any) -> Scores:
    return score(model, find_sites(model), "magnitude")


def divergence(model: Any, dense: torch.Tensor, text: Windows) -> float:
    return float(fidelity(dense, batch_logits(model, text), text.targets)[0].sum()) / text.n_targets


def only(scores: Scores, site: FFNSite, width: int) -> PruningPlan:
    kept = torch.sort(scores.values[site], descending=True, stable=True).indices[:width].sort().values
    return PruningPlan({site: kept}, "by hand", "single", Budget(0.5))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_a_cut_is_that_of_a_whole_forward(name: str, batch_size: int) -> None:
    model, text = model_of(name), windows()
    scores = scores_of(model)
    dense = batch_logits(model, text)
    calls: list[tuple[int, int]] = []
    found = measure_curves(
        model, scores, None, text, options=CurveOptions((0.25, 0.75), batch_size), on_cut=lambda *n: calls.append(n)
    )
    assert list(found.points) == list(scores.values) and "nats per token" in found.unit
    for site, (widths, rises) in found.points.items():
        assert widths.tolist() == [site.d_ff // 4, 3 * site.d_ff // 4]
        for width, rise in zip(widths.tolist(), rises.tolist(), strict=True):
            with reconstructed(model, Reconstruction(only(scores, site, width), {})):
                assert rise == pytest.approx(divergence(model, dense, text), rel=1e-6, abs=1e-12)
    assert calls[-1] == (2 * len(found.points) * (3 if batch_size == 2 else 1),) * 2
    assert torch.equal(batch_logits(model, text), dense)


def test_refitted_cuts() -> None:
    model, text = model_of("llama"), windows(40)
    scores, stats = scores_of(model), collect(model, windows(40), ["h_outer"])
    dense = batch_logits(model, text)
    found = measure_curves(model, scores, stats, text, options=CurveOptions((0.5,)))
    for site, (widths, rises) in found.points.items():
        with reconstructed(model, reconstruct(model, only(scores, site, int(widths[0])), stats)):
            assert float(rises[0]) == pytest.approx(divergence(model, dense, text), rel=1e-6)


def test_around_a_solution_the_others_stay_cut() -> None:
    model, text = model_of("llama"), windows()
    scores = scores_of(model)
    dense = batch_logits(model, text)
    around = Reconstruction(build_plan(scores, 0.5), {})
    found = measure_curves(model, scores, None, text, around=around)
    for site, (widths, rises) in found.points.items():
        middle = site.d_ff // 2
        assert widths.tolist() == [round(middle - 0.2 * site.d_ff), middle, round(middle + 0.2 * site.d_ff)]
        kept = {s: v for s, v in around.plan.kept.items() if s != site}
        others = Reconstruction(PruningPlan(kept, "by hand", "local", Budget(0.5)), {})
        with reconstructed(model, others):
            whole = divergence(model, dense, text)
        with reconstructed(model, around):
            assert float(rises[1]) == pytest.approx(divergence(model, dense, text) - whole, rel=1e-6)
    assert torch.equal(batch_logits(model, text), dense)


def test_the_measured_allocator_takes_them() -> None:
    model, text = model_of("llama"), windows()
    scores = scores_of(model)
    curves = measure_curves(model, scores, None, text)
    plan = build_plan(scores, Budget(0.5, multiple_of=4), "measured", curves=curves)
    assert plan.sparsity == 0.5
    total = sum(float(curves.at(s, torch.tensor([w]))) for s, w in plan.widths.items())
    even = sum(float(curves.at(s, torch.tensor([w]))) for s, w in build_plan(scores, 0.5).widths.items())
    assert total <= even + 1e-12


def test_bad_input() -> None:
    model, text = model_of("llama"), windows()
    scores = scores_of(model)
    for shares in ((), (0.0,), (1.0,), (50,)):
        with pytest.raises(UsageError, match=r"shares must be kept shares in \(0, 1\)"):
            CurveOptions(shares)
    first = next(iter(scores.values))
    around = Reconstruction(only(scores, first, 4), {})
    with pytest.raises(UsageError, match=r"the solution to measure around has no model\.layers\.1\.mlp"):
        measure_curves(model, scores, None, text, around=around)
