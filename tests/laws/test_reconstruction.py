"""A reconstruction in memory and for good are one model, on every layout; in memory it leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ffnscope.apply.export import save_model
from ffnscope.apply.mask import masked
from ffnscope.apply.one_shot import compensate_bias, reconstruct
from ffnscope.apply.reconstruction import (
    read_reconstruction,
    reconstruct_,
    reconstructed,
    write_reconstruction,
)
from ffnscope.errors import NotAvailableError
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.types import Budget, PruningPlan
from offload import KINDS
from reconstructions import (
    EXACT,
    VISIBLE,
    MakePlan,
    distance,
    make,
    outputs,
    refit,
    reloaded,
    state,
    stats_of,
    unchanged,
)
from tiny import logits, tiny
from tiny_listed import tiny_listed
from tiny_moe import tiny_moe

# gated, with biases, fused, plain with biases, Conv1D; experts fused in each storage, split, with biases
DENSE = ["llama", "llama_bias", "phi3", "glm", "opt", "gpt2"]
EXPERTS = ["mixtral", "gpt_oss", "dbrx", "deepseek_v3", "aria_text", "nemotron_h"]
BIASED = ["llama", "llama_bias", "smollm3", "opt", "gpt2", "starcoder2", "gpt_oss"]
OFF = ["mistral", "qwen2", "phi3"]
layouts = pytest.mark.parametrize("name", [*DENSE, *EXPERTS, "listed", "up_first"])
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fewer than 4 tokens per channel", "ignore:experts of one layer lie in"
)


@layouts
class TestLeastSquares:
    def test_in_memory_for_good_and_reloaded(self, name: str, random_plan: MakePlan, tmp_path: Path) -> None:
        model = make(name)
        found = refit(model, random_plan)
        dense = logits(model)
        with masked(model, found.plan):
            by_mask = logits(model)
        with reconstructed(model, found) as inside:
            assert inside is model
            in_memory = logits(model)
        assert distance(in_memory, by_mask) > VISIBLE and distance(in_memory, dense) > VISIBLE
        assert distance(logits(reconstruct_(model, found)), in_memory) < EXACT
        assert [s.d_ff for s in find_sites(model)] == list(found.plan.widths.values())
        if name not in ("listed", "up_first"):  # code that is not part of transformers
            save_model(model, None, tmp_path / "out", plan=found.plan)
            assert distance(logits(reloaded(tmp_path / "out")), in_memory) < EXACT

    @pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
    def test_no_trace(self, name: str, random_plan: MakePlan, failure: Any) -> None:
        model = make(name)
        before, found, dense = state(model), refit(model, random_plan), logits(model)
        flags = [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()]
        assert unchanged(model, before)  # it was only read
        if failure is None:
            with reconstructed(model, found):
                assert not unchanged(model, before)
        else:
            with pytest.raises(failure), reconstructed(model, found):
                raise failure
        assert unchanged(model, before) and torch.equal(logits(model), dense)
        assert [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()] == flags

    def test_the_output_error_is_the_least_and_what_is_told(self, name: str, random_plan: MakePlan) -> None:
        """Of the first layer, whose input does not change: measured at the real outputs."""
        model = make(name)
        found, wanted = refit(model, random_plan, damping=1e-6), outputs(model)
        first = [site for site in found.down if site.layer == min(s.layer for s in found.down)]
        with masked(model, found.plan):
            without = outputs(model)
        with reconstructed(model, found):
            after = outputs(model)
        for site in first:
            error, before = ((y[site] - wanted[site]).square().sum() for y in (after, without))
            assert float(error) < 0.95 * float(before)
            told = found.facts["sites"][site.name]
            assert told["tokens"] == len(wanted[site])
            bias = weights_of(model, site).down_bias if name != "gpt_oss" else None  # y of fused experts has none
            power = float((wanted[site] - (0 if bias is None else bias)).square().sum())
            assert told["error"] == pytest.approx(float(error) / power, rel=1e-3)
            assert told["error_without"] == pytest.approx(float(before) / power, rel=1e-3)

    def test_nothing_removed(self, name: str, random_plan: MakePlan) -> None:
        model = make(name)
        before, found = state(model), refit(model, random_plan, 0.0)
        assert not found.down and not found.bias
        with reconstructed(model, found):
            assert unchanged(model, before)
        assert unchanged(reconstruct_(model, found), before)

    def test_copies_are_replaced_exactly(self, name: str) -> None:
        """The second half of the channels computes the same as the first, and is removed."""
        model = make(name)
        sites = find_sites(model)
        with torch.no_grad():
            for site in sites:
                weights, half = weights_of(model, site), site.d_ff // 2
                for rows in (weights.gate, weights.up, weights.gate_bias, weights.up_bias):
                    if rows is not None:
                        rows[half:] = rows[:half]
        dense = logits(model)
        kept = {site: torch.arange(site.d_ff // 2) for site in sites}
        plan = PruningPlan(kept, "by hand", "local", Budget(0.5))
        found = reconstruct(model, plan, stats_of(model), damping=1e-9)
        assert all(f["error"] < 1e-6 < f["error_without"] for f in found.facts["sites"].values())
        with masked(model, plan):
            assert distance(logits(model), dense) > VISIBLE
        with reconstructed(model, found):
            assert distance(logits(model), dense) < EXACT
        for site in sites:
            half = site.d_ff // 2
            whole = weights_of(model, site).down
            torch.testing.assert_close(found.down[site], whole[:, :half] + whole[:, half:], rtol=1e-2, atol=1e-2)

    def test_files(self, name: str, random_plan: MakePlan, tmp_path: Path) -> None:
        model = make(name)
        found = refit(model, random_plan)
        write_reconstruction(tmp_path / "r.safetensors", found)
        again = read_reconstruction(tmp_path / "r.safetensors")
        assert again.facts == found.facts and again.plan.widths == found.plan.widths
        assert again.down.keys() == found.down.keys()
        assert all(torch.equal(v, again.down[s]) for s, v in found.down.items())
        with reconstructed(model, found):
            first = logits(model)
        with reconstructed(model, again):
            assert torch.equal(logits(model), first)


class TestBiases:
    @pytest.mark.parametrize("name", BIASED)
    def test_in_memory_for_good_and_reloaded(self, name: str, random_plan: MakePlan, tmp_path: Path) -> None:
        model = make(name)
        before, plan, wanted = state(model), random_plan(model), outputs(model)
        found = compensate_bias(model, plan, stats_of(model, "act_sum"))
        assert not found.down and found.bias.keys() == plan.kept.keys()
        with masked(model, plan):
            without, by_mask = outputs(model), logits(model)
        with reconstructed(model, found):
            in_memory, after = logits(model), outputs(model)
        assert unchanged(model, before) and distance(in_memory, by_mask) > VISIBLE
        for site in (s for s in plan.kept if s.layer == 0 and s.expert is None):  # the means are right again
            torch.testing.assert_close(after[site].mean(0), wanted[site].mean(0), rtol=1e-4, atol=1e-5)
            errors = [float((y[site] - wanted[site]).square().sum()) for y in (after, without)]
            assert errors[0] < errors[1]
        if name in ("llama", "smollm3"):
            assert model.config.mlp_bias is False
        reconstruct_(model, found)
        assert distance(logits(model), in_memory) < EXACT
        if name in ("llama", "smollm3"):
            assert model.config.mlp_bias is True
            assert not any(
                layer.mlp.gate_proj.bias.any() or layer.mlp.up_proj.bias.any() for layer in model.model.layers
            )
            assert model.model.layers[0].mlp.gate_proj.bias.shape == (36,)
        save_model(model, None, tmp_path / "out", plan=plan)
        assert distance(logits(reloaded(tmp_path / "out")), in_memory) < EXACT

    @pytest.mark.parametrize("name", OFF)
    def test_a_config_that_cannot_hold_it(self, name: str, random_plan: MakePlan) -> None:
        model = make(name)
        before, plan = state(model), random_plan(model)
        found = compensate_bias(model, plan, stats_of(model, "act_sum"))
        with masked(model, plan):
            by_mask = logits(model)
        with reconstructed(model, found):
            assert distance(logits(model), by_mask) > VISIBLE
        with pytest.raises(NotAvailableError, match=r"no field of its config gives them one.*Evaluate it in memory"):
            reconstruct_(model, found)
        assert unchanged(model, before)

    @pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
    def test_no_trace(self, llama: Any, random_plan: MakePlan, failure: Any) -> None:
        before = state(llama)
        found = compensate_bias(llama, random_plan(llama), stats_of(llama, "act_sum"))
        with pytest.raises(failure), reconstructed(llama, found):
            assert llama.model.layers[0].mlp.down_proj.bias.any()
            raise failure
        assert unchanged(llama, before) and llama.model.layers[0].mlp.down_proj.bias is None
        assert [n for n, _ in llama.named_parameters()] == list(dict.fromkeys(n for n, _ in llama.named_parameters()))

    def test_experts_in_a_list(self, random_plan: MakePlan) -> None:
        model = tiny_listed()
        before, plan = state(model), random_plan(model)
        found = compensate_bias(model, plan, stats_of(model, "act_sum"))
        wanted = outputs(model)
        with reconstructed(model, found):
            after = outputs(model)
        assert unchanged(model, before)
        for site in (s for s in found.bias if s.layer == 0):
            torch.testing.assert_close(after[site].mean(0), wanted[site].mean(0), rtol=1e-4, atol=1e-5)

    def test_experts_in_one_tensor(self, random_plan: MakePlan) -> None:
        model = tiny_moe("mixtral")
        text = r"model.layers.0.mlp.experts.0 lies in parameters that all experts of its layer share, without a bias"
        with pytest.raises(NotAvailableError, match=text):
            compensate_bias(model, random_plan(model), stats_of(model, "act_sum"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["llama_bias", "gpt2", "phi3"])
class TestOffloaded:
    def test_as_the_resident_one(self, kind: str, arch: str, random_plan: MakePlan, tmp_path: Path) -> None:
        model, resident = KINDS[kind](arch, tmp_path), tiny(arch)
        empty, dense = {n for n, p in model.named_parameters() if p.device.type == "meta"}, logits(resident)
        found, wanted = refit(model, random_plan), refit(resident, random_plan)
        assert all(torch.equal(v, wanted.down[s]) for s, v in found.down.items())
        with reconstructed(model, found), reconstructed(resident, found):
            assert torch.equal(logits(model), logits(resident))
        assert torch.equal(logits(model), dense)
        reconstruct_(model, found)
        assert torch.equal(logits(model), logits(reconstruct_(resident, found)))
        assert {n for n, p in model.named_parameters() if p.device.type == "meta"} == empty

    def test_biases(self, kind: str, arch: str, random_plan: MakePlan, tmp_path: Path) -> None:
        model, resident = KINDS[kind](arch, tmp_path), tiny(arch)
        plan, stats = random_plan(resident), stats_of(resident, "act_sum")
        if arch == "phi3":
            text = r"the weights of model.layers.\d.mlp are offloaded and have no bias that could be changed"
            with pytest.raises(NotAvailableError, match=text):
                compensate_bias(model, plan, stats)
            with (
                pytest.raises(NotAvailableError, match=text),
                reconstructed(model, compensate_bias(resident, plan, stats)),
            ):
                raise AssertionError("never entered")
            return
        found = compensate_bias(model, plan, stats)
        with reconstructed(model, found), reconstructed(resident, found):
            assert torch.equal(logits(model), logits(resident))
        assert torch.equal(logits(reconstruct_(model, found)), logits(reconstruct_(resident, found)))
