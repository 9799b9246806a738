"""Reconstructions that are refused, and their files."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ffnscope.apply.one_shot import compensate_bias, reconstruct
from ffnscope.apply.reconstruction import (
    Reconstruction,
    read_reconstruction,
    reconstruct_,
    reconstructed,
    write_reconstruction,
)
from ffnscope.calibrate.collect import collect
from ffnscope.errors import ArtifactError, ModelError, NonFiniteError, NotAvailableError, UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.types import Budget, ChannelStats, PruningPlan
from reconstructions import (
    MakePlan,
    refit,
    state,
    stats_of,
    unchanged,
)
from reference import text
from tiny_all import tiny_causal_lm

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fewer than 4 tokens per channel", "ignore:experts of one layer lie in"
)


class TestRefusals:
    def test_a_norm_before_down(self, random_plan: MakePlan) -> None:
        model = tiny_causal_lm("bitnet")
        text = r"cannot be reconstructed: a norm \(.*\) stands before its down projection.*Prune without reconstruction"
        self.refused(model, random_plan(model), text)

    @pytest.mark.parametrize("name", ["zamba", "zamba2"])
    def test_shared_ffns(self, name: str, random_plan: MakePlan) -> None:
        model = tiny_causal_lm(name)
        self.refused(model, random_plan(model), r"cannot be reconstructed: \d layers share its parameters \(also ")

    def refused(self, model: Any, plan: PruningPlan, text: str) -> None:
        sites = find_sites(model)
        eye = {s: torch.eye(s.d_ff, dtype=torch.float64) for s in sites}
        stats = {
            s: ChannelStats(
                s,
                {"h_outer": eye[s], "act_sum": eye[s][0]},
                {"h_outer": 999, "act_sum": 999},
                {"h_outer": "sum", "act_sum": "sum"},
            )
            for s in sites
        }
        given = Reconstruction(plan, {s: torch.zeros(s.d_model, k.numel()) for s, k in plan.kept.items()})
        before = state(model)
        for attempt in (
            lambda: reconstruct(model, plan, stats),
            lambda: compensate_bias(model, plan, stats),
            lambda: reconstruct_(model, given),
            lambda: reconstructed(model, given).__enter__(),
        ):
            with pytest.raises(NotAvailableError, match=text):
                attempt()
        assert unchanged(model, before)
        whole = PruningPlan({s: torch.arange(s.d_ff) for s in sites}, "all", "local", Budget(0.0))
        assert not reconstruct(model, whole, stats).down  # nothing to reconstruct

    def test_weights_without_values(self, llama: Any, random_plan: MakePlan) -> None:
        found = refit(llama, random_plan)
        empty = copy.deepcopy(llama).to("meta")
        for attempt in (lambda: reconstruct_(empty, found), lambda: reconstructed(empty, found).__enter__()):
            with pytest.raises(ModelError, match="is on the meta device and has no value"):
                attempt()

    def test_statistics_that_are_missing(self, llama: Any, random_plan: MakePlan) -> None:
        plan, stats = random_plan(llama), stats_of(llama)
        first, *_ = stats
        with pytest.raises(UsageError, match=r"there are no statistics of model.layers.1.mlp; calibrate the model"):
            reconstruct(llama, plan, {first: stats[first]})
        with pytest.raises(UsageError, match=r"statistic 'act_sum' was not collected for model.layers.0.mlp"):
            compensate_bias(llama, plan, stats)
        with pytest.raises(UsageError, match="statistic 'h_outer' was not collected"):
            reconstruct(llama, plan, stats_of(llama, "act_sum"))

    def test_reconstructions_that_cannot_be(self, llama: Any, random_plan: MakePlan) -> None:
        plan = random_plan(llama, 0.5)
        site = next(iter(plan.kept))
        with pytest.raises(UsageError, match=r"model.layers.0.mlp: expected down \(32, 24\), got \(32, 48\)"):
            Reconstruction(plan, {site: torch.zeros(32, 48)})
        with pytest.raises(UsageError, match=r"expected bias \(32,\), got \(24,\)"):
            Reconstruction(plan, {}, {site: torch.zeros(24)})
        with pytest.raises(NonFiniteError, match=r"model.layers.0.mlp: down holds NaN or infinity"):
            Reconstruction(plan, {site: torch.full((32, 24), torch.nan)})
        with pytest.raises(UsageError, match="down is given for elsewhere, which is not in the plan"):
            Reconstruction(plan, {replace(site, path="elsewhere"): torch.zeros(32, 24)})

    def test_files(self, llama: Any, random_plan: MakePlan, tmp_path: Path) -> None:
        found = refit(llama, random_plan)
        write_reconstruction(tmp_path / "r", found)
        with pytest.raises(ArtifactError, match="already exists"):
            write_reconstruction(tmp_path / "r", found)
        write_reconstruction(tmp_path / "r", replace(found, facts={"again": True}), overwrite=True)
        assert read_reconstruction(tmp_path / "r").facts == {"again": True}
        with pytest.raises(ArtifactError, match="does not exist"):
            read_reconstruction(tmp_path / "other")

    @pytest.mark.filterwarnings("default")
    def test_few_tokens(self, llama: Any, random_plan: MakePlan) -> None:
        few = collect(llama, text(11), ["h_outer"])
        message = (
            r"2 of 2 FFNs were calibrated on fewer than 4 tokens per channel \(model.layers.0.mlp: 176 tokens for 48 "
            r"channels\), so that least squares fits noise. Calibrate on more text."
        )
        with pytest.warns(UserWarning, match=message):
            reconstruct(llama, random_plan(llama), few)
