"""A reconstruction in memory and for good are one model, on every layout; in memory it leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope.apply.export import save_model
from ffnscope.apply.mask import masked
from ffnscope.apply.one_shot import compensate_bias, reconstruct
from ffnscope.apply.reconstruction import (
    Reconstruction,
    read_reconstruction,
    reconstruct_,
    reconstructed,
    write_reconstruction,
)
from ffnscope.apply.refit import DAMPINGS
from ffnscope.calibrate.collect import collect
from ffnscope.calibrate.taps import SignalTap, channel_taps
from ffnscope.errors import ArtifactError, ModelError, NonFiniteError, NotAvailableError, UsageError
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.plan.build import build_plan
from ffnscope.scoring import score
from ffnscope.types import Budget, ChannelStats, FFNSite, PruningPlan
from offload import KINDS
from reference import text
from tiny import logits, tiny
from tiny_all import tiny_causal_lm
from tiny_listed import tiny_listed
from tiny_moe import tiny_moe, up_first

MakePlan = Callable[..., PruningPlan]
WINDOWS = text(32)
EXACT, VISIBLE = 1e-4, 1e-2
# gated, with biases, fused, plain with biases, Conv1D; experts fused in each storage, split, with biases
DENSE = ["llama", "llama_bias", "phi3", "glm", "opt", "gpt2"]
EXPERTS = ["mixtral", "gpt_oss", "dbrx", "deepseek_v3", "aria_text", "nemotron_h"]
BIASED = ["llama", "llama_bias", "smollm3", "opt", "gpt2", "starcoder2", "gpt_oss"]
OFF = ["mistral", "qwen2", "phi3"]
layouts = pytest.mark.parametrize("name", [*DENSE, *EXPERTS, "listed", "up_first"])
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fewer than 4 tokens per channel", "ignore:experts of one layer lie in"
)


def make(name: str, **changes: Any) -> Any:
    if name == "listed":
        return tiny_listed()
    if name == "up_first":
        return up_first(tiny_moe("mixtral"))
    return (tiny if name in [*DENSE, *BIASED, *OFF] and name != "gpt_oss" else tiny_moe)(name, **changes)


def stats_of(model: Any, *names: str) -> dict[FFNSite, ChannelStats]:
    return collect(model, WINDOWS, names or ("h_outer",))


def refit(model: Any, random_plan: MakePlan, sparsity: float = 0.5, **options: Any) -> Reconstruction:
    return reconstruct(model, random_plan(model, sparsity), stats_of(model), **options)


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: Any, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


def distance(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).abs().max())


def outputs(model: Any) -> dict[FFNSite, Tensor]:
    """y of every FFN on the calibration tokens, [n, d_model]; of an expert on its own tokens."""
    found: dict[FFNSite, list[Tensor]] = {}
    tap = SignalTap(lambda site, _, value: found.setdefault(site, []).append(value.flatten(0, -2).clone()), ("y",))
    with torch.no_grad(), channel_taps(model, find_sites(model), None, signal_tap=tap):
        logits(model, WINDOWS.input_ids)
    return {site: torch.cat(parts) for site, parts in found.items()}


def reloaded(path: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


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
        with pytest.raises(
            NotAvailableError, match=r"no field of its config gives them one.*Evaluate it in memory with"
        ):
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


class TestNumbers:
    def test_held_out_tokens_choose_the_damping(self, llama: Any, random_plan: MakePlan) -> None:
        plan, stats = random_plan(llama, 0.5), collect(llama, WINDOWS[:4], ["h_outer"])
        other = collect(llama, WINDOWS[4:], ["h_outer"])
        found = reconstruct(llama, plan, stats, held_out=other)
        facts = list(found.facts["sites"].values())
        assert {f["damping"] for f in facts} <= set(DAMPINGS)
        for chosen, site in zip(facts, found.down, strict=True):
            errors = {}
            for damping in DAMPINGS:
                new = reconstruct(llama, plan, stats, damping=damping).down[site].double()
                change = weights_of(llama, site).down.double().clone()
                change[:, plan.kept[site]] -= new
                errors[damping] = float(((change @ other[site].total("h_outer")) * change).sum())
            assert chosen["damping"] == min(errors, key=lambda d: errors[d])
        # fitted on both
        both = {s: part.merge(other[s]) for s, part in stats.items()}
        for site, one in zip(found.down, facts, strict=True):
            joint = reconstruct(llama, plan, both, damping=one["damping"])
            torch.testing.assert_close(found.down[site], joint.down[site], rtol=1e-5, atol=1e-6)
        with pytest.raises(UsageError, match="give a damping, or held_out statistics that choose it; not both"):
            reconstruct(llama, plan, stats, damping=0.1, held_out=other)
        with pytest.raises(UsageError, match=r"no held-out statistics of model.layers.0.mlp"):
            reconstruct(llama, plan, stats, held_out={})
        with pytest.raises(UsageError, match="damping must be positive"):
            reconstruct(llama, plan, stats, damping=0.0)

    def test_the_default_damping(self, llama: Any, random_plan: MakePlan) -> None:
        found, same = refit(llama, random_plan), refit(llama, random_plan, damping=0.01)
        assert all(torch.equal(v, same.down[s]) for s, v in found.down.items())

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


class TestRefusals:
    def test_a_norm_before_down(self, random_plan: MakePlan) -> None:
        model = tiny_causal_lm("bitnet")
        text = r"cannot be reconstructed: a norm \(.*\) stands before its down projection.*Prune it without"
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

    def test_whole_in_a_plan_of_obs(self) -> None:
        model = tiny_moe("deepseek_v3")
        model.model.layers[1].mlp.gate.e_score_correction_bias[2] = -1e4
        stats = stats_of(model)
        with pytest.warns(UserWarning, match=r"experts.2\), so obs cannot rank"):
            plan = build_plan(score(model, stats, "obs"), 0.5)
        found = reconstruct(model, plan, stats)
        whole = next(s for s in plan.kept if s.name == "model.layers.1.mlp.experts.2")
        assert plan.kept[whole].numel() == whole.d_ff and whole not in found.down
