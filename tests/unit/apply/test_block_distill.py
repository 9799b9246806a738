"""Distillation within the sequential reconstruction: activations as measured, the stream, resuming, what is refused."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffnscope.apply.block_distill import measured_activations
from ffnscope.apply.distill import Distillation
from ffnscope.apply.reconstruction import Reconstruction, reconstructed
from ffnscope.apply.sequential import SequentialOptions, reconstruct_sequential
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NotAvailableError, UsageError
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.projection import down_projection, weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.plan.build import build_plan
from ffnscope.scoring import score
from ffnscope.types import FFNSite, PruningPlan
from offload import KINDS
from reconstructions import state, unchanged
from reference import exact, text
from tiny import tiny
from tiny_all import tiny_causal_lm
from tiny_moe import tiny_moe

SHORT = Distillation(epochs=2, learning_rate=1e-2, batch_tokens=64)
USELESS = Distillation(epochs=2, learning_rate=1e30)
pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than 4 d_ff")


def plan_of(model: Any, sparsity: float = 0.5) -> PruningPlan:
    return build_plan(score(model, find_sites(model), "random", seed=0), sparsity)


def made(model: Any, distillation: Distillation = SHORT, windows: Windows | None = None, **options: Any) -> Any:
    given = SequentialOptions(distillation=distillation, **options)
    return reconstruct_sequential(model, text(16) if windows is None else windows, plan_of(model), options=given)


def heard(model: Any, site: FFNSite, windows: Windows) -> Tensor:
    """h of a whole forward, [n, d_ff]."""
    found: list[Tensor] = []
    handle = down_projection(model, site).register_forward_pre_hook(
        lambda module, args: found.append(args[0].flatten(0, -2).clone())
    )
    with torch.no_grad():
        model(input_ids=windows.input_ids, use_cache=False)
    handle.remove()
    return torch.cat(found)


def same(first: Reconstruction, second: Reconstruction) -> bool:
    pairs = first.tensors, second.tensors
    return pairs[0].keys() == pairs[1].keys() and all(torch.equal(v, pairs[1][k]) for k, v in pairs[0].items())


class TestActivations:
    @pytest.mark.parametrize(
        ("arch", "name"),
        [
            ("llama", "silu"),
            ("llama_relu", "relu"),
            ("gemma2", "gelu_pytorch_tanh"),
            ("gpt2", "gelu_new"),
            ("opt", "relu"),
            ("bloom", "gelu"),
            ("glm", "silu"),
        ],
    )
    def test_the_one_of_the_model(self, arch: str, name: str) -> None:
        from transformers.activations import ACT2FN

        model = tiny(arch)
        with frozen(model):
            found = measured_activations(model, find_sites(model), text(1))
        x = torch.linspace(-3, 3, 50)
        for function in found.values():
            torch.testing.assert_close(function(x), ACT2FN[name](x), rtol=1e-3, atol=1e-3)

    def test_what_the_config_says_is_not_believed(self) -> None:
        model = tiny("llama")
        model.model.layers[1].mlp.act_fn = nn.ReLU()
        sites = find_sites(model)
        assert {site.activation for site in sites} == {"silu"}
        with frozen(model):
            first, second = measured_activations(model, sites, text(1)).values()
        assert float(first(torch.tensor(-1.0))) < 0 == float(second(torch.tensor(-1.0)))

    def test_an_unusual_one_is_refused_by_name(self) -> None:
        model = tiny("llama")
        model.model.layers[1].mlp.act_fn = nn.Softplus()
        with pytest.raises(NotAvailableError, match=r"layers.1.mlp cannot be distilled: .*its config names \(silu\)"):
            made(model)


class TestFits:
    def test_starts_at_the_least_squares_of_the_tokens_to_fit(self) -> None:
        """Nothing is trained here, so the error of the least squares on held-out windows is told too."""
        found = made(exact("llama"), USELESS, text(64))
        for one in found.facts["sites"].values():
            assert one["distilled"]["epochs"] == 0
            assert one["distilled"]["error_start"] == pytest.approx(one["error"] * one["power"], rel=1e-6)

    @pytest.mark.parametrize("arch", ["llama", "llama_bias", "phi3", "glm", "gpt2", "opt", "gemma2", "falcon", "phi"])
    def test_lowers_the_error_on_text_that_it_has_not_seen(self, arch: str) -> None:
        model = tiny(arch)
        before = state(model)
        found = made(model, replace(SHORT, epochs=6), text(32))
        assert unchanged(model, before)
        for site, one in found.facts["sites"].items():
            assert one["trained"] and one["held_out"], site
            start = one["distilled"]["error_start"] / one["power"]
            assert one["error"] < start <= one["error_without"]
        assert found.facts["trained"] is True and found.facts["tokens"] == 32 * 16
        assert found.facts["distillation"] == asdict(replace(SHORT, epochs=6))
        assert found.name == "sequential refit, distilled (trained)"
        assert found.rows.keys() == found.down.keys()
        biased = [s for s in found.down if weights_of(model, s).down_bias is not None]
        assert list(found.bias) == biased
        for site, rows in found.rows.items():
            dense = weights_of(model, site)
            for name in ("gate", "up", "gate_bias", "up_bias"):
                old, new = getattr(dense, name), getattr(rows, name)
                assert (old is None) == (new is None)
                assert old is None or not torch.equal(old[found.plan.kept[site]], new)

    def test_later_blocks_are_given_what_the_trained_ones_put_out(self) -> None:
        """The error without a refit of the second FFN: removed columns times its channels behind the first."""
        model, windows = exact("llama"), text(16)
        found = made(model, windows=windows, target="own")
        first, second = found.plan.kept
        only = replace(found.plan, kept={first: found.plan.kept[first]})
        with reconstructed(model, Reconstruction(only, {first: found.down[first]}, rows={first: found.rows[first]})):
            h = heard(model, second, windows[7::8])
        removed = found.plan.removed(second)
        missing = h[:, removed] @ weights_of(model, second).down[:, removed].T
        told = found.facts["sites"][second.name]
        assert told["error_without"] * told["power"] == pytest.approx(float(missing.square().sum(1).mean()), rel=1e-8)
        wanted = h @ weights_of(model, second).down.T
        assert told["power"] == pytest.approx(float(wanted.square().sum(1).mean()), rel=1e-8)

    def test_the_error_that_is_told_is_that_of_the_model(self) -> None:
        """Where no last refit sees the held-out windows: on what the first FFN puts out."""
        model, windows = exact("llama"), text(16)
        found = made(model, replace(SHORT, epochs=1, learning_rate=3e-3), windows, target="own")
        site = next(iter(found.plan.kept))
        told, held = found.facts["sites"][site.name], windows[7::8]
        dense = heard(model, site, held) @ weights_of(model, site).down.T
        with reconstructed(model, found):
            after = heard(model, site, held) @ weights_of(model, site).down.T
        error = float((after - dense).square().sum(1).mean())
        if told["distilled"]["refit"]:
            assert error < told["error"] * told["power"]
        else:
            assert error == pytest.approx(told["error"] * told["power"], rel=1e-8)

    def test_nothing_is_trained_where_it_does_not_help(self) -> None:
        model = tiny("llama")
        found = made(model, USELESS)
        plain = reconstruct_sequential(model, text(16), plan_of(model))
        assert not found.rows and found.facts["trained"] is False and found.name == "sequential refit"
        for site, value in plain.down.items():  # the stream is that of another run of the block
            torch.testing.assert_close(found.down[site], value, rtol=1e-4, atol=1e-4)

    def test_the_same_again(self) -> None:
        model = tiny("llama_bias")
        assert same(made(model), made(model))
        assert not same(made(model), made(model, replace(SHORT, seed=1)))

    def test_within_inference_mode(self) -> None:
        model = tiny("llama_bias")
        with torch.inference_mode():
            found = made(model)
        assert same(found, made(model))

    def test_a_damping_leaves_windows_to_choose_the_epoch(self) -> None:
        found = made(tiny("llama"), replace(SHORT, epochs=6), text(32), damping=1e-2)
        assert all(one["trained"] and one["damping"] == 1e-2 for one in found.facts["sites"].values())

    def test_error_weights(self) -> None:
        model, windows = tiny("llama"), text(32)
        plan, options = plan_of(model), SequentialOptions(distillation=replace(SHORT, epochs=6))
        first = next(iter(plan.kept))
        metric = torch.diag(torch.tensor([100.0] + [1.0] * 31))
        plain = reconstruct_sequential(model, windows, plan, options=options)
        found = reconstruct_sequential(model, windows, plan, options=options, error_weights={first: metric})
        assert not torch.equal(found.rows[first].up, plain.rows[first].up)
        told = found.facts["sites"][first.name]["distilled"]
        assert min(told["error_trained"], told["error_refit"]) > told["error"]

    def test_steps_are_told(self) -> None:
        done: list[tuple[int, int]] = []
        model = tiny("llama")
        options = SequentialOptions(distillation=SHORT)
        reconstruct_sequential(model, text(16), plan_of(model), options=options, on_block=lambda *now: done.append(now))
        assert done == [(step, 6) for step in range(1, 7)]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("arch", ["llama_bias", "phi3"])
    def test_offloaded_weights_give_the_same(self, arch: str, kind: str, tmp_path: Path) -> None:
        wanted, found = made(tiny(arch)), made(KINDS[kind](arch, tmp_path))
        for name, value in wanted.tensors.items():
            torch.testing.assert_close(found.tensors[name], value)


class TestResume:
    @pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
    @pytest.mark.parametrize("stop", [1, 2])
    def test_after_an_interrupt(self, arch: str, stop: int, tmp_path: Path) -> None:
        model = tiny(arch, num_hidden_layers=3) if arch != "gpt2" else tiny(arch, n_layer=3)
        plain = made(model)
        options = SequentialOptions(distillation=SHORT, checkpoint=tmp_path / "state")
        before = state(model)

        def interrupt(done: int, total: int) -> None:
            if done == stop * 3 + 1:  # an epoch of the next block
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            reconstruct_sequential(model, text(16), plan_of(model), options=options, on_block=interrupt)
        assert unchanged(model, before)
        assert len(list((tmp_path / "state").iterdir())) == stop
        steps: list[int] = []
        again = reconstruct_sequential(
            model, text(16), plan_of(model), options=options, on_block=lambda done, _: steps.append(done)
        )
        assert same(again, plain) and again.facts == plain.facts
        assert steps[:stop] == [3 * (i + 1) for i in range(stop)]  # no epoch of a finished block

    def test_files_of_other_options_are_not_used(self, tmp_path: Path) -> None:
        model = tiny("llama")

        def stopping(done: int, total: int) -> None:
            if done == 3:
                raise KeyboardInterrupt

        options = SequentialOptions(distillation=SHORT, checkpoint=tmp_path)
        with pytest.raises(KeyboardInterrupt):
            reconstruct_sequential(model, text(16), plan_of(model), options=options, on_block=stopping)
        other = replace(SHORT, seed=1)
        assert same(made(model, other, checkpoint=tmp_path), made(model, other))


class TestRefusals:
    def test_experts(self) -> None:
        with pytest.raises(NotAvailableError, match=r"experts.0 cannot be distilled: it is an expert"):
            made(tiny_moe("mixtral"))

    def test_norms(self) -> None:
        with pytest.raises(NotAvailableError, match="stands before its down"):
            made(tiny_causal_lm("bitnet"))

    def test_too_few_windows(self) -> None:
        with pytest.raises(UsageError, match="holds out every 8th window to choose the epoch; got 7 windows"):
            made(tiny("llama"), windows=text(7))

    def test_error_weights(self) -> None:
        model = tiny("llama")
        plan, site = plan_of(model), find_sites(model)[0]
        with pytest.raises(UsageError, match="error_weights would do nothing without a distillation"):
            reconstruct_sequential(model, text(8), plan, error_weights={})
        options = SequentialOptions(distillation=SHORT)
        with pytest.raises(UsageError, match=r"expected \[d_model, d_model\] = \(32, 32\), got \(4, 4\)"):
            reconstruct_sequential(model, text(8), plan, options=options, error_weights={site: torch.eye(4)})
        other = replace(site, path="elsewhere")
        with pytest.raises(UsageError, match="error_weights are given for elsewhere, which is not in the plan"):
            reconstruct_sequential(model, text(8), plan, options=options, error_weights={other: torch.eye(32)})
