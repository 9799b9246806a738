"""Pruning in rounds against its steps written out, on tiny models."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import stop_at
from ffnscope.analyze.pruning import plan_and_reconstruct
from ffnscope.apply.method import Method, reconstruct_plan
from ffnscope.apply.pruned import as_pruned, plan_of
from ffnscope.apply.reconstruction import Reconstruction
from ffnscope.apply.rounds import RoundSteps, plan_in_rounds
from ffnscope.apply.sequential import reconstruct_sequential
from ffnscope.calibrate import passes
from ffnscope.calibrate.collect import PassOptions, collect
from ffnscope.errors import ArtifactError, UsageError
from ffnscope.plan.build import build_plan
from ffnscope.plan.nested import plan_within
from ffnscope.scoring import score
from ffnscope.types import Budget, PruningPlan, Scores
from reconstructions import state, unchanged
from reference import text
from tiny import tiny
from tiny_moe import tiny_moe

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer t")
WINDOWS = text(24)


def same(one: PruningPlan, other: PruningPlan) -> bool:
    return all(torch.equal(kept, other.kept[site]) for site, kept in one.kept.items())


@pytest.mark.parametrize("reconstruct", ["none", "one_shot", "sequential"])
@pytest.mark.parametrize(("metric", "allocator"), [("obs_loss", "halfway"), ("wanda", "local")])
def test_two_rounds_are_their_steps(llama: Any, metric: str, allocator: str, reconstruct: Any) -> None:
    method = Method(metric, allocator, reconstruct, rounds=2)
    before = state(llama)
    found = plan_and_reconstruct(llama, WINDOWS, 0.75, method=method, options=PassOptions())
    assert unchanged(llama, before)
    dense = collect(llama, WINDOWS, ["h_outer", "act_sq", "dy_outer"])
    first = build_plan(score(llama, dense, metric), 0.5, allocator)
    with as_pruned(llama, reconstruct_plan(llama, first, method, windows=WINDOWS, stats=dense)):
        again = score(llama, collect(llama, WINDOWS, ["h_outer", "act_sq", "dy_outer"]), metric)
    second = plan_within(again, Budget(0.75), allocator, first)
    assert same(plan_of(found), second) and plan_of(found).provenance["rounds"] == [0.5, 0.75]
    straight = plan_and_reconstruct(llama, WINDOWS, 0.75, method=Method(metric, allocator, reconstruct))
    assert metric == "wanda" or not same(plan_of(straight), second)  # rounds change the selection
    if reconstruct == "sequential":  # and nothing else: columns are fitted to the dense model
        assert isinstance(found, Reconstruction)
        expected = reconstruct_sequential(llama, WINDOWS, second)
        assert all(torch.equal(down, expected.down[site]) for site, down in found.down.items())


def test_one_round_is_a_plan(llama: Any) -> None:
    scores = score(llama, collect(llama, WINDOWS, ["act_sq"]), "wanda")

    def refuse(*_: Any) -> Any:
        raise AssertionError("one round needs no more")

    found = plan_in_rounds(llama, scores, Budget(0.5), Method("wanda", "local", "none"), RoundSteps(refuse, refuse))
    assert same(found, build_plan(scores, 0.5)) and "rounds" not in found.provenance


@pytest.mark.parametrize("rounds", [2, 4])
def test_every_round_is_within_the_one_before(llama: Any, rounds: int) -> None:
    seen: list[PruningPlan] = []

    def refit(plan: PruningPlan) -> PruningPlan:
        seen.append(plan)
        return plan

    def again(number: int) -> Scores:
        assert number == len(seen) + 1
        removed = seen[-1].removed(next(iter(seen[-1].kept)))
        assert not bool(llama.model.layers[0].mlp.down_proj.weight[:, removed].any())
        return score(llama, collect(llama, WINDOWS, ["act_sq"]), "wanda")

    first = score(llama, collect(llama, WINDOWS, ["act_sq"]), "wanda")
    method = Method("wanda", "halfway", "none", rounds=rounds)
    last = plan_in_rounds(llama, first, Budget(0.5), method, RoundSteps(again, refit))
    plans = [*seen, last]
    assert len(plans) == rounds and last.sparsity == 0.5
    for one, other in pairwise(plans):
        assert one.sparsity < other.sparsity
        assert all(set(kept.tolist()) <= set(one.kept[site].tolist()) for site, kept in other.kept.items())


def test_an_interrupted_call_goes_on(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method("wanda", "local", "sequential", rounds=3)
    first = score(llama, collect(llama, WINDOWS, ["act_sq"]), "wanda")
    calls: list[int] = []

    def again(number: int) -> Scores:
        calls.append(number)
        if number == stop:
            raise KeyboardInterrupt
        return score(llama, collect(llama, WINDOWS, ["act_sq"]), "wanda")

    def plan(folder: Path | None) -> PruningPlan:
        steps = RoundSteps(again, lambda plan: reconstruct_sequential(llama, WINDOWS, plan), folder)
        return plan_in_rounds(llama, first, Budget(0.5), method, steps)

    stop = 0
    unbroken = plan(None)
    stop, before = 3, state(llama)
    with pytest.raises(KeyboardInterrupt):
        plan(tmp_path)
    assert unchanged(llama, before)
    stop = 0
    calls.clear()
    assert same(plan(tmp_path), unbroken) and calls == [3]
    (damaged,) = tmp_path.glob("round_2_*.json")
    damaged.write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read as JSON"):
        plan(tmp_path)


def test_the_passes_of_python_go_on(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method("wanda", "local", "sequential", rounds=2)
    options = PassOptions(checkpoint=tmp_path / "sums.safetensors", checkpoint_every=4)
    unbroken = plan_and_reconstruct(llama, WINDOWS, 0.5, method=method)
    with monkeypatch.context() as patch:
        stop_at(patch, passes, "_run_group", 10)  # 6 steps a pass
        with pytest.raises(KeyboardInterrupt):
            plan_and_reconstruct(llama, WINDOWS, 0.5, method=method, options=options)
    assert [path.name for path in tmp_path.iterdir()] == ["sums.round_2.safetensors"]
    found = plan_and_reconstruct(llama, WINDOWS, 0.5, method=method, options=options)
    assert same(plan_of(found), plan_of(unbroken)) and not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*were reached by no token", "ignore:.*cannot rank")
def test_experts() -> None:
    model = tiny_moe("deepseek_v3")
    model.model.layers[1].mlp.gate.e_score_correction_bias[2] = -1e4
    method = Method("obs", "local", "sequential", rounds=2)
    found = plan_of(plan_and_reconstruct(model, WINDOWS, 0.5, method=method))
    whole = next(s for s in found.kept if s.name == "model.layers.1.mlp.experts.2")
    assert found.kept[whole].numel() == whole.d_ff
    assert whole.name in found.provenance["unreached"]


def test_bad_input() -> None:
    with pytest.raises(
        UsageError, match="rounds must be at least 1, the number of times that channels are ranked; got 0"
    ):
        Method(rounds=0)
    with pytest.raises(UsageError, match="sparsity 0 leaves nothing for 2 rounds to remove"):
        plan_and_reconstruct(tiny("llama"), WINDOWS, 0.0, method=Method("wanda", "local", "none", rounds=2))
