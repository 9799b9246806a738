"""One-shot reconstructions: damping, dtypes, widths, tokens that are few or none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ffnscope.apply.export import save_model
from ffnscope.apply.held_out import collect_held_out, is_held_out
from ffnscope.apply.mask import masked
from ffnscope.apply.one_shot import reconstruct
from ffnscope.apply.reconstruction import (
    reconstruct_,
    reconstructed,
)
from ffnscope.apply.refit import DAMPINGS
from ffnscope.apply.sequential import SequentialOptions, reconstruct_sequential
from ffnscope.calibrate.collect import PassOptions, collect
from ffnscope.errors import UsageError
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.plan.build import build_plan
from ffnscope.scoring import score
from reconstructions import (
    EXACT,
    WINDOWS,
    MakePlan,
    distance,
    refit,
    reloaded,
    state,
    stats_of,
    unchanged,
)
from reference import text
from tiny import logits, tiny
from tiny_moe import tiny_moe

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fewer than 4 tokens per channel", "ignore:experts of one layer lie in"
)


class TestNumbers:
    def test_held_out_tokens_choose_the_damping(self, llama: Any, random_plan: MakePlan) -> None:
        plan, windows = random_plan(llama, 0.5), text(40)
        stats, held = collect(llama, windows, ["h_outer"]), collect_held_out(llama, windows)
        assert held is not None
        found = reconstruct(llama, plan, stats, held_out=held)
        facts = list(found.facts["sites"].values())
        assert {f["damping"] for f in facts} <= set(DAMPINGS)
        assert found.facts["damping"] == "chosen on held-out tokens"
        assert all(f["refitted"] and f["held_out"] and f["tokens"] == windows.n_tokens for f in facts)
        others = collect(llama, windows[~is_held_out(windows)], ["h_outer"])
        tried = {damping: reconstruct(llama, plan, others, damping=damping) for damping in DAMPINGS}
        for chosen, site in zip(facts, found.down, strict=True):
            errors = {}
            for damping, one in tried.items():
                change = weights_of(llama, site).down.double().clone()
                change[:, plan.kept[site]] -= one.down[site].double()
                errors[damping] = float(((change @ held[site].total("h_outer")) * change).sum())
            assert chosen["damping"] == min(errors, key=lambda d: errors[d])
            # then all tokens are fitted
            joint = reconstruct(llama, plan, stats, damping=chosen["damping"])
            assert torch.equal(found.down[site], joint.down[site])

    def test_the_same_choice_as_block_by_block(self, llama: Any, random_plan: MakePlan) -> None:
        """The first block sees the same tokens in both kinds of refit; its own output is the target."""
        plan, windows = random_plan(llama, 0.5), text(40)
        stats = collect(llama, windows, ["h_outer"])
        once = reconstruct(llama, plan, stats, held_out=collect_held_out(llama, windows))
        own = SequentialOptions(target="own")
        blocks = reconstruct_sequential(llama, windows, plan, options=own)
        site = next(iter(plan.kept))
        mine, theirs = (found.facts["sites"][site.name] for found in (once, blocks))
        assert theirs.keys() - mine.keys() == {"target"}
        assert all(mine[name] == pytest.approx(theirs[name], rel=1e-4) for name in mine)
        torch.testing.assert_close(once.down[site], blocks.down[site], rtol=1e-4, atol=1e-5)

    def test_what_held_out_statistics_cannot_be(self, llama: Any, random_plan: MakePlan) -> None:
        plan, windows = random_plan(llama, 0.5), text(40)
        stats, held = collect(llama, windows, ["h_outer"]), collect_held_out(llama, windows)
        with pytest.raises(UsageError, match="give a damping, or held_out statistics that choose it; not both"):
            reconstruct(llama, plan, stats, damping=0.1, held_out=held)
        with pytest.raises(UsageError, match=r"no held-out statistics of model.layers.0.mlp"):
            reconstruct(llama, plan, stats, held_out={})
        with pytest.raises(UsageError, match=r"model.layers.0.mlp .* are not those of a part of the tokens"):
            reconstruct(llama, plan, stats, held_out=stats)  # all tokens are no part
        louder = {s: replace(one, values={"h_outer": 20 * one.total("h_outer")}) for s, one in (held or {}).items()}
        with pytest.raises(UsageError, match=r"not those of a part of the tokens .* every 8th window"):
            reconstruct(llama, plan, stats, held_out=louder)
        with pytest.raises(UsageError, match="damping must be positive"):
            reconstruct(llama, plan, stats, damping=0.0)
        assert collect_held_out(llama, windows[:7]) is None

    def test_old_columns_stay_where_new_ones_are_worse_on_held_out_tokens(
        self, llama: Any, random_plan: MakePlan
    ) -> None:
        plan, held = random_plan(llama, 0.5), collect(llama, WINDOWS[4:], ["h_outer"])
        found = reconstruct(llama, plan, stats_of(llama), held_out=held)  # fitted to 4 windows
        rows = [found.facts["sites"][site.name] for site in found.down]
        assert not all(row["refitted"] for row in rows)
        for site, row in zip(found.down, rows, strict=True):
            assert row["error"] <= row["error_without"]
            same = torch.equal(found.down[site], weights_of(llama, site).down[:, plan.kept[site]])
            assert same != row["refitted"]

    def test_the_default_damping(self, llama: Any, random_plan: MakePlan) -> None:
        found, same = refit(llama, random_plan), refit(llama, random_plan, damping=0.01)
        assert all(torch.equal(v, same.down[s]) for s, v in found.down.items())
        assert (found.facts["damping"], same.facts["damping"]) == ("0.01, no tokens held out", "0.01, given")

    def test_held_out_in_bfloat16(self, random_plan: MakePlan) -> None:
        """Batches of two passes round differently, and their difference still has a factorisation."""
        model = tiny("llama", dtype=torch.bfloat16)
        plan, windows = random_plan(model, 0.5), text(40)
        stats = collect(model, windows, ["h_outer"], options=PassOptions(3))
        found = reconstruct(model, plan, stats, held_out=collect_held_out(model, windows, options=PassOptions(2)))
        assert all(row["held_out"] and row["refitted"] for row in found.facts["sites"].values())

    def test_bfloat16(self, random_plan: MakePlan) -> None:
        model = tiny("llama", dtype=torch.bfloat16)
        before, found = state(model), refit(model, random_plan)
        assert {v.dtype for v in found.down.values()} == {torch.bfloat16}
        with reconstructed(model, found):
            in_memory = logits(model)
        assert unchanged(model, before)
        by_slice = logits(reconstruct_(model, found))
        assert by_slice.dtype == torch.bfloat16
        assert distance(in_memory, by_slice) < 0.03 * float(in_memory.float().abs().max())

    def test_an_order_of_obs_is_refitted_best(self, llama: Any, random_plan: MakePlan) -> None:
        """Both read h_outer only; the greedy order leaves less error than a random one."""
        stats = stats_of(llama)
        greedy = reconstruct(llama, build_plan(score(llama, stats, "obs"), 0.5), stats)
        random = reconstruct(llama, random_plan(llama, 0.5), stats)
        for site in greedy.down:
            assert greedy.facts["sites"][site.name]["error"] < 0.9 * random.facts["sites"][site.name]["error"]

    def test_nested_in_a_mask(self, llama: Any, random_plan: MakePlan) -> None:
        before, found = state(llama), refit(llama, random_plan)
        with masked(llama, random_plan(llama, seed=1)):
            inside = state(llama)
            with reconstructed(llama, found):
                pass
            assert unchanged(llama, inside)
        assert unchanged(llama, before)

    def test_padded_to_the_widest(self, llama: Any, random_plan: MakePlan, tmp_path: Path) -> None:
        plan = random_plan(llama, 0.5, allocator="global")
        found = reconstruct(llama, plan, stats_of(llama))
        with reconstructed(llama, found):
            in_memory = logits(llama)
        reconstruct_(llama, found, pad_to_widest=True)
        assert {s.d_ff for s in find_sites(llama)} == {max(plan.widths.values())}
        save_model(llama, None, tmp_path / "out", plan=plan)
        assert distance(logits(reloaded(tmp_path / "out")), in_memory) < EXACT

    def test_different_widths(self, llama: Any, random_plan: MakePlan, tmp_path: Path) -> None:
        found = reconstruct(llama, random_plan(llama, 0.5, allocator="global"), stats_of(llama))
        with reconstructed(llama, found):
            in_memory = logits(llama)
        save_model(reconstruct_(llama, found), None, tmp_path / "out")
        assert distance(logits(reloaded(tmp_path / "out", trust_remote_code=True)), in_memory) < EXACT


class TestUnreachedExperts:
    def test_left_as_they_are(self, random_plan: MakePlan) -> None:
        model = tiny_moe("deepseek_v3")
        model.model.layers[1].mlp.gate.e_score_correction_bias[2] = -1e4
        found = refit(model, random_plan)
        missing = {s.name for s in found.plan.kept} - {s.name for s in found.down}
        assert missing == {"model.layers.1.mlp.experts.2"}
        with reconstructed(model, found):
            in_memory = logits(model)
        assert distance(logits(reconstruct_(model, found)), in_memory) < EXACT

    def test_whose_tokens_are_all_held_out_or_none(self, random_plan: MakePlan) -> None:
        model = tiny_moe("deepseek_v3")
        plan, stats, held = random_plan(model, 0.5), stats_of(model), collect_held_out(model, WINDOWS)
        assert held is not None
        every, none, *_ = [site for site in plan.kept if site.expert is not None and stats[site].n_tokens]
        empty = replace(held[none], values={"h_outer": 0 * held[none].total("h_outer")}, counts={"h_outer": 0})
        found = reconstruct(model, plan, stats, held_out={**held, every: stats[every], none: empty})
        fixed = reconstruct(model, plan, stats)
        for site, new in found.down.items():
            row = found.facts["sites"][site.name]
            assert row["held_out"] == (site not in (every, none))
            assert row["tokens"] == stats[site].counts["h_outer"]
            if site in (every, none):
                assert row["damping"] == 0.01 and torch.equal(new, fixed.down[site])

    def test_whole_in_a_plan_of_obs(self) -> None:
        model = tiny_moe("deepseek_v3")
        model.model.layers[1].mlp.gate.e_score_correction_bias[2] = -1e4
        stats = stats_of(model)
        with pytest.warns(UserWarning, match=r"experts.2\), so obs cannot rank"):
            plan = build_plan(score(model, stats, "obs"), 0.5)
        found = reconstruct(model, plan, stats)
        whole = next(s for s in plan.kept if s.name == "model.layers.1.mlp.experts.2")
        assert plan.kept[whole].numel() == whole.d_ff and whole not in found.down
