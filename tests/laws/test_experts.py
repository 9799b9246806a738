"""An expert's channels: their statistics against a loop over tokens, their removal by mask and by slice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope.apply.mask import masked
from ffnscope.apply.slice import slice_
from ffnscope.calibrate.collect import PassOptions, calibrate, join_statistics
from ffnscope.calibrate.windows import Windows
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.registry import METRICS, STATISTICS
from ffnscope.types import ChannelStats, FFNSite, PruningPlan
from reference import of_ffns, padded, text
from slow_moe import expert_paths, slow_forward, slow_rows
from tiny import logits, tokens
from tiny_moe import EXPERT, MIXTURES, N_EXPERTS, TOP_K, tiny_moe

MakePlan = Callable[..., PruningPlan]
CORE = torch.tensor([1, 5, 13])
# inkling's experts that all tokens share are no routed ones, and its routed ones are those of mixtral
ROUTED = [name for name in MIXTURES if name != "inkling_text"]


def experts_of(model: Any) -> list[FFNSite]:
    return [site for site in find_sites(model) if site.expert is not None]


def all_statistics(model: Any, sites: list[FFNSite], windows: Windows, **options: Any) -> dict[FFNSite, ChannelStats]:
    core = dict.fromkeys(sites, CORE)
    how = PassOptions(**options)
    passes = [calibrate(model, windows, METRICS.names(), sites=sites, core=c, options=how) for c in (None, core)]
    return of_ffns(join_statistics(*passes))


def slow_sums(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    x, h, g, dy = (rows[name] for name in ("x", "h", "g", "dy"))
    q = h * g
    return {
        "act_sum": h.sum(0),
        "act_abs": h.abs().sum(0),
        "act_sq": (h * h).sum(0),
        "act_window_sq": sum(
            (h[rows["window"] == w].abs().mean(0) ** 2 for w in rows["window"].unique()), torch.zeros(())
        ),
        "grad_sq": (g * g).sum(0),
        "taylor_abs": q.abs().sum(0),
        "taylor_sq": (q * q).sum(0),
        "taylor_sum": q.sum(0),
        "taylor_core": sum((torch.outer(row[CORE], row) for row in q), torch.zeros(())),
        "x_sum": x.sum(0),
        "ffn_in_sq": (x * x).sum(0),
        "x_sq": (x * x).sum(0),
        "x_outer": sum((torch.outer(row, row) for row in x), torch.zeros(())),
        "xh_outer": sum((torch.outer(a, b) for a, b in zip(x, h, strict=True)), torch.zeros(())),
        "h_outer": sum((torch.outer(row, row) for row in h), torch.zeros(())),
        "dy_outer": sum((torch.outer(row, row) for row in dy), torch.zeros(())),
    }


@pytest.mark.parametrize("name", ROUTED)
class TestStatistics:
    def test_the_slow_forward_is_the_model(self, name: str) -> None:
        model = tiny_moe(name, dtype=torch.float64)
        expected = logits(model)
        paths = expert_paths(name, model)
        assert paths
        for path in paths:
            module = model.get_submodule(path)
            module.forward = slow_forward(name, path, module, {})
        assert float((logits(model) - expected).abs().max()) < 1e-5

    def test_against_a_loop_over_tokens(self, name: str) -> None:
        model, windows = tiny_moe(name, dtype=torch.float64), padded([16, 9, 4, 13])
        sites = experts_of(model)
        found = all_statistics(model, sites, windows, batch_size=3)
        expected = slow_rows(name, model, windows)
        assert {(s.path, s.expert) for s in sites} >= expected.keys()
        for site, stats in found.items():
            rows = expected.get((site.path, site.expert or 0))
            n = 0 if rows is None else len(rows["h"])
            n_targets = 0 if rows is None else int(rows["predicts"].sum())
            for key, total in stats.values.items():
                if key == "y_sq":
                    continue  # test_signals.py compares y
                if key == "act_hist":
                    assert int(total.sum()) == EXPERT * (0 if rows is None else len(rows["window"].unique()))
                    continue
                assert stats.counts[key] == (n_targets if STATISTICS.get(key).needs_gradient else n)
                if rows is None:
                    wanted = torch.zeros_like(total)
                elif key == "ffn_out_sq":
                    wanted = (rows["h"] @ weights_of(model, site).down.T).square().sum(0)
                else:
                    wanted = slow_sums(rows)[key]
                scale = max(float(wanted.abs().max()), 1e-12)
                assert float((total - wanted).abs().max()) < 1e-4 * scale, (site.name, key)

    def test_every_token_is_counted_once_per_expert_that_it_is_routed_to(self, name: str) -> None:
        model, windows = tiny_moe(name), padded([16, 9, 4, 13])
        found = calibrate(model, windows, ["wanda", "scar_loss_proxy"], sites=experts_of(model))
        for path in expert_paths(name, model):
            counts = {k: [s.counts[k] for f, s in found.items() if f.path == path] for k in ("act_sq", "taylor_sq")}
            assert len(counts["act_sq"]) == N_EXPERTS
            if name == "longcat_flash":  # some tokens go to experts without weights
                assert 0 < sum(counts["act_sq"]) < TOP_K * windows.n_tokens
            else:
                top_k = 1 if name == "llama4_text" and model.config.num_experts_per_tok == 1 else TOP_K
                assert sum(counts["act_sq"]) == top_k * windows.n_tokens
                assert sum(counts["taylor_sq"]) == top_k * windows.n_targets

    def test_batch_size_does_not_matter(self, name: str) -> None:
        model, windows = tiny_moe(name, dtype=torch.float64), padded([16, 9, 4, 13])
        sites = experts_of(model)
        one, many = (all_statistics(model, sites, windows, batch_size=n) for n in (1, 4))
        for site in sites:
            assert one[site].counts == many[site].counts
            for key, value in one[site].values.items():
                torch.testing.assert_close(value, many[site].values[key], rtol=1e-5, atol=1e-7)

    def test_nothing_is_left_on_the_model(self, name: str) -> None:
        model = tiny_moe(name)
        before, dense = model.config._experts_implementation, logits(model)
        calibrate(model, text(2), ["scar_loss_proxy"])
        assert model.config._experts_implementation == before
        assert torch.equal(logits(model), dense)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", MIXTURES)
class TestRemoval:
    @pytest.mark.parametrize("sparsity", [0.25, 0.5])
    def test_mask_equals_slice(self, name: str, random_plan: MakePlan, sparsity: float) -> None:
        model = tiny_moe(name)
        plan, other = random_plan(model, sparsity), random_plan(model, sparsity, seed=1)
        dense = logits(model)
        with masked(model, plan):
            by_mask = logits(model)
        assert torch.equal(logits(model), dense)
        sliced = slice_(copy.deepcopy(model), plan)
        assert float((by_mask - logits(sliced)).abs().max()) < 1e-4
        assert float((by_mask - dense).abs().max()) > 1e-2
        assert float((by_mask - logits(slice_(copy.deepcopy(model), other))).abs().max()) > 1e-2
        assert [s.d_ff for s in find_sites(sliced)] == list(plan.widths.values())

    def test_weights_are_really_gone(self, name: str, random_plan: MakePlan) -> None:
        model = tiny_moe(name)
        plan = random_plan(model, 0.5)
        before = {site: weights_of(model, site) for site in plan.kept}
        sliced = slice_(copy.deepcopy(model), plan)
        for new, (old, kept) in zip(find_sites(sliced), plan.kept.items(), strict=True):
            assert new.name == old.name
            found = weights_of(sliced, new)
            assert torch.equal(found.up, before[old].up[kept])
            assert torch.equal(found.down, before[old].down[:, kept])
            for part in ("gate", "gate_bias", "up_bias"):
                value, whole = getattr(found, part), getattr(before[old], part)
                assert (value is None) == (whole is None)
                assert value is None or torch.equal(value, whole[kept])
        assert logits(sliced, tokens(1, 4)).shape == (1, 4, model.config.get_text_config().vocab_size)

    def test_experts_keep_different_channels(self, name: str, random_plan: MakePlan) -> None:
        plan = random_plan(tiny_moe(name), 0.5)
        sets = {tuple(kept.tolist()) for site, kept in plan.kept.items() if site.expert is not None}
        assert len(sets) > 1
