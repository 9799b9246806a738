"""Baselines that zero single weights: against calibration and whole forwards, and the laws that they must keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope.apply.patterns import highest, pattern_of
from ffnscope.apply.sparse_weights import SparseWeights, sparsified
from ffnscope.apply.sparsegpt import sparsegpt
from ffnscope.apply.targets import find_targets
from ffnscope.apply.unstructured import dass_weights, magnitude_weights, sparsegpt_weights, wanda_weights
from ffnscope.calibrate.collect import collect
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NonFiniteError, NotAvailableError, UsageError
from ffnscope.ffn.matrices import Matrix, matrices_of
from ffnscope.ffn.sites import find_sites
from ffnscope.types import ChannelStats, FFNSite
from reconstructions import make, state, unchanged
from reference import exact, padded, text
from tiny import FUSED, tiny
from tiny_all import tiny_causal_lm
from tiny_moe import tiny_moe

pytestmark = pytest.mark.filterwarnings("ignore:.*of fewer than 4 tokens per", "ignore:.*reached by no token")
ASKED = [0.3, "2:4", "4:8"]
KINDS = ["llama", "gpt2", "phi3", "glm", "falcon", "opt", "mixtral", "listed", "dbrx", "gpt_oss"]
Method = Callable[..., SparseWeights]
CALIBRATED: list[Method] = [wanda_weights, sparsegpt_weights, dass_weights]


def scoped(method: Method, scope: str = "ffn") -> dict[str, Any]:
    """The scope, for methods that have one."""
    return {} if method is dass_weights else {"scope": scope}


def partly(found: SparseWeights, layer: int, sites: Sequence[FFNSite]) -> SparseWeights:
    """What was found in layers before this one."""
    inside = {m for s in sites if s.layer < layer for m in matrices_of(s).values()}
    masks = {m: mask for m, mask in found.masks.items() if m in inside}
    return replace(found, masks=masks, weights={m: w for m, w in found.weights.items() if m in inside})


def layers(
    model: Any, found: SparseWeights, windows: Windows, names: Sequence[str]
) -> list[dict[FFNSite, ChannelStats]]:
    """Statistics of each layer, when the layers before it are sparse."""
    sites, stats = find_sites(model), []
    for layer in sorted({site.layer for site in sites}):
        with sparsified(model, partly(found, layer, sites)):
            every = collect(model, windows, names)
        stats.append({site: one for site, one in every.items() if site.layer == layer})
    return stats


class TestAgainstCalibration:
    """The statistics of the calibration pass know padding, experts and layouts; they are tested on their own."""

    @pytest.mark.parametrize("asked", [0.5, "2:4"])
    @pytest.mark.parametrize("name", KINDS)
    def test_wanda_of_ffns(self, name: str, asked: float | str) -> None:
        model, windows, pattern = make(name), padded([16, 9, 16, 12, 3, 16, 11, 16]), pattern_of(asked)
        found = wanda_weights(model, windows, asked, scope="ffn")
        for stats in layers(model, found, windows, ("ffn_in_sq", "act_sq")):
            for site, one in stats.items():
                for which, matrix in matrices_of(site).items():
                    square = one.total("act_sq" if which == site.down else "ffn_in_sq")
                    wanted = highest(matrix.weight(model).double().abs() * square.sqrt(), pattern)
                    assert agreement(found.masks[matrix], wanted) > 0.999, matrix.name

    @pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "listed"])
    def test_sparsegpt_of_ffns(self, name: str) -> None:
        model, windows, pattern = make(name), padded([16, 9, 16, 12, 3, 16, 11, 16]), pattern_of(0.5)
        found = sparsegpt_weights(model, windows, 0.5, scope="ffn")
        for stats in layers(model, found, windows, ("x_outer", "h_outer")):
            for site, one in stats.items():
                for which, matrix in matrices_of(site).items():
                    second = one.total("h_outer" if which == site.down else "x_outer")
                    keep, new = sparsegpt(matrix.weight(model), second, pattern)
                    assert agreement(found.masks[matrix], keep) > 0.995, matrix.name
                    if torch.equal(found.masks[matrix], keep):
                        torch.testing.assert_close(found.weights[matrix].double(), new, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("asked", [0.5, "2:4"])
    @pytest.mark.parametrize("name", ["llama", *FUSED, "mixtral", "listed", "gpt_oss"])
    def test_dass(self, name: str, asked: float | str) -> None:
        model, windows, pattern = make(name), text(8), pattern_of(asked)
        found = dass_weights(model, windows, asked, alpha=0.7)
        for stats in layers(model, found, windows, ("act_sq",)):
            for site, one in stats.items():
                norms = one.total("act_sq").sqrt()
                for which, matrix in matrices_of(site).items():
                    weight, mask = matrix.weight(model).double().abs(), found.masks[matrix]
                    if which == site.down:
                        assert agreement(mask, highest(weight * norms, pattern)) > 0.999
                        continue
                    halves = [slice(None)] if site.fused is None else [slice(0, site.d_ff), slice(site.d_ff, None)]
                    if site.fused == "interleaved":
                        halves = [slice(0, None, 2), slice(1, None, 2)]
                    for rows in halves:
                        wanted = highest((weight[rows] * norms[:, None] ** 0.7).T, pattern).T
                        assert agreement(mask[rows], wanted) > 0.999


def agreement(found: Tensor, wanted: Tensor) -> float:
    """Share of weights on which masks agree: sums in float32 may decide a near tie otherwise."""
    return float((found == wanted).double().mean())


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [wanda_weights, sparsegpt_weights])
def test_all_linear_modules_against_whole_forwards(arch: str, method: Method) -> None:
    model, windows, pattern = exact(arch), padded([16, 9, 16, 12, 16, 16, 11, 16]), pattern_of(0.5)
    found = method(model, windows, 0.5, scope="linear")
    per_block = 7 if arch == "llama" else 4
    matrices = list(found.masks)
    assert len(matrices) == 2 * per_block
    assert not any("embed" in m.name or "head" in m.name or "wte" in m.name for m in matrices)
    for block in range(2):
        done = matrices[: block * per_block]
        part = replace(
            found,
            masks={m: found.masks[m] for m in done},
            weights={m: w for m, w in found.weights.items() if m in done},
        )
        here = matrices[block * per_block : (block + 1) * per_block]
        with sparsified(model, part):
            reads = inputs_of(model, [m.path for m in here], windows)
        for matrix in here:
            x, weight = reads[matrix.path], matrix.weight(model)
            if method is wanda_weights:
                assert torch.equal(found.masks[matrix], highest(weight.abs() * x.square().sum(0).sqrt(), pattern))
                continue
            keep, new = sparsegpt(weight, x.T @ x, pattern)
            assert torch.equal(found.masks[matrix], keep)
            torch.testing.assert_close(found.weights[matrix], new, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def inputs_of(model: Any, paths: Sequence[str], windows: Windows) -> dict[str, Tensor]:
    """What modules read at all valid tokens, in a whole forward."""
    reads: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: reads.__setitem__(path, args[0][windows.valid])
        )
        for path in paths
    ]
    model(input_ids=windows.input_ids, attention_mask=windows.valid.long(), use_cache=False)
    for handle in handles:
        handle.remove()
    return reads


class TestCounts:
    @pytest.mark.parametrize("asked", [0, 0.3, 0.5, "2:4", "4:8"])
    @pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral"])
    def test_what_is_removed_is_exact(self, name: str, asked: float | str) -> None:
        model, pattern = make(name), pattern_of(asked)
        for method in (magnitude_weights, wanda_weights, sparsegpt_weights):
            found = method(model, *(() if method is magnitude_weights else (text(8),)), asked, scope="ffn")
            assert found.label == pattern.label == found.facts["kind"]
            for matrix, mask in found.masks.items():
                if pattern.group is not None:
                    groups = mask.reshape(-1, pattern.group[1])
                    assert (groups.sum(1) == pattern.group[0]).all(), matrix.name
                elif method is wanda_weights:
                    assert ((~mask).sum(1) == int(pattern.sparsity * mask.shape[1])).all()
                else:  # narrower than a block of columns, so one block is the matrix
                    assert int((~mask).sum()) == int(pattern.sparsity * mask.numel())

    @pytest.mark.parametrize("asked", [0.3, "2:4", "4:8"])
    def test_of_dass(self, asked: float | str) -> None:
        pattern = pattern_of(asked)
        found = dass_weights(tiny("llama"), text(8), asked)
        for matrix, mask in found.masks.items():
            together = mask if "down" in matrix.name else mask.T
            if pattern.group is None:
                assert ((~together).sum(1) == int(pattern.sparsity * together.shape[1])).all()
            else:
                assert (together.reshape(-1, pattern.group[1]).sum(1) == pattern.group[0]).all()

    @pytest.mark.parametrize("method", CALIBRATED)
    def test_sparsity_zero_changes_nothing(self, method: Method) -> None:
        model = tiny("llama")
        before = state(model)
        found = method(model, text(8), 0.0, **scoped(method))
        assert found.sparsity == 0
        assert not found.weights
        with sparsified(model, found):
            assert unchanged(model, before)

    def test_facts_say_what_the_sparsity_is_of(self) -> None:
        model = tiny("llama")
        ffn = wanda_weights(model, text(8), 0.5, scope="ffn")
        linear = wanda_weights(model, text(8), 0.5, scope="linear")
        assert ffn.sparsity == linear.sparsity == 0.5
        assert ffn.facts["of"] == "weights of gate, up and down of every FFN"
        assert linear.facts["of"] == "weights of every linear module of the decoder blocks (attention and FFN)"
        total = sum(p.numel() for p in model.parameters())
        assert ffn.facts["share_of_all_parameters"] == pytest.approx(0.5 * ffn.n_weights / total)
        assert linear.n_weights > ffn.n_weights
        assert "no speed-up" in ffn.facts["size"]
        assert (ffn.facts["method"], ffn.facts["tokens"]) == ("wanda", 128)


class TestLaws:
    @pytest.mark.parametrize("method", CALIBRATED)
    @pytest.mark.parametrize("arch", ["llama", "gpt2"])
    def test_batch_size_does_not_matter(self, method: Method, arch: str) -> None:
        if method is dass_weights and arch == "gpt2":
            return
        model, windows = exact(arch), padded([16, 9, 16, 12, 3, 16, 11])
        first, again = (method(model, windows, 0.5, batch_size=size, **scoped(method)) for size in (1, 4))
        for matrix, mask in first.masks.items():
            assert torch.equal(mask, again.masks[matrix])
        for matrix, weight in first.weights.items():
            torch.testing.assert_close(weight, again.weights[matrix], rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("method", CALIBRATED)
    def test_order_of_channels_does_not_matter(self, method: Method) -> None:
        """Rows of gate and up change places with each other, and inputs of down likewise."""
        model, turned = exact("llama", seed=1), exact("llama", seed=1)
        order = torch.randperm(48, generator=torch.Generator().manual_seed(2))
        for layer in turned.model.layers:
            for name in ("gate_proj", "up_proj"):
                module = getattr(layer.mlp, name)
                module.weight.data = module.weight.data[order].contiguous()
            layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, order].contiguous()
        first, again = (method(m, text(8), 0.5, **scoped(method)) for m in (model, turned))
        for name in ("gate_proj", "up_proj"):  # of the first block, whose inputs are the same
            matrix = Matrix(f"model.layers.0.mlp.{name}")
            assert torch.equal(again.masks[matrix], first.masks[matrix][order])
        if method is wanda_weights:
            for matrix, mask in first.masks.items():
                moved = mask[:, order] if "down" in matrix.name else mask[order]
                assert torch.equal(again.masks[matrix], moved)

    @pytest.mark.parametrize("method", CALIBRATED)
    @pytest.mark.parametrize("scope", ["ffn", "linear"])
    def test_the_model_is_as_before(self, method: Method, scope: str) -> None:
        model = tiny("llama")
        model.train()
        before = state(model)
        method(model, text(8), 0.5, **scoped(method, scope))
        assert unchanged(model, before)
        assert model.training

        def stop(done: int, total: int) -> None:
            assert (done, total) == (1, 2)
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            method(model, text(8), 0.5, on_block=stop, **scoped(method, scope))
        assert unchanged(model, before)

    @pytest.mark.parametrize("method", CALIBRATED)
    def test_half_precision(self, method: Method) -> None:
        model = tiny("llama", dtype=torch.bfloat16)
        found = method(model, text(8), "2:4", **scoped(method))
        assert found.sparsity == 0.5
        assert all(w.dtype == torch.bfloat16 for w in found.weights.values())
        with sparsified(model, found), torch.no_grad():
            assert torch.isfinite(model(input_ids=text(2).input_ids).logits).all()

    def test_error_on_the_calibration_text_by_method(self) -> None:
        """Error of the FFN's output in the first block, whose inputs are the dense ones."""
        model, windows = exact("llama"), text(64)
        sites = find_sites(model)
        with torch.no_grad():
            embed = model.model.embed_tokens.weight  # correlated inputs
            embed.copy_(
                embed[:, :6] @ torch.randn(6, 32, dtype=embed.dtype, generator=torch.Generator().manual_seed(0))
            )
        stats = collect(model, windows, ("h_outer",))[sites[0]]
        down, errors = Matrix(f"{sites[0].path}.down_proj"), []
        for found in (
            sparsegpt_weights(model, windows, 0.5, scope="ffn"),
            wanda_weights(model, windows, 0.5, scope="ffn"),
            magnitude_weights(model, 0.5, scope="ffn"),
        ):
            weight = down.weight(model)
            change = found.weights.get(down, weight * found.masks[down]) - weight
            errors.append(float(((change @ stats.total("h_outer")) * change).sum()))
        assert errors[0] < errors[1] < errors[2]


class TestExperts:
    def test_an_expert_without_tokens_stays_whole_and_is_told(self) -> None:
        model = tiny_moe("mixtral")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight[3] = -100 * layer.mlp.gate.weight[:3].mean(0)
        windows = text(1, 2)
        with pytest.warns(UserWarning, match=r"matrices were reached by no token \(.*experts\.\d.*\); they stay whole"):
            found = wanda_weights(model, windows, 0.5, scope="ffn")
        whole = found.facts["whole"]
        assert whole
        assert all(found.sparsities[name] == (0 if name in whole else 0.5) for name in found.sparsities)

    def test_a_kind_of_its_own_is_refused_for_all_linear_modules(self) -> None:
        with pytest.raises(NotAvailableError, match=r"is an expert: scope 'linear' .*Use scope 'ffn'"):
            magnitude_weights(tiny_moe("mixtral"), 0.5, scope="linear")


class TestRefusals:
    def test_a_norm_before_down(self) -> None:
        model = tiny_causal_lm("bitnet")
        with pytest.raises(NotAvailableError, match=r"has a norm \(.*\) before its down projection.*scope 'linear'"):
            wanda_weights(model, text(4), 0.5, scope="ffn")
        assert wanda_weights(model, text(4), 0.5, scope="linear").sparsity == 0.5
        assert magnitude_weights(model, 0.5, scope="ffn").sparsity == 0.5

    @pytest.mark.parametrize("name", ["zamba", "zamba2"])
    def test_shared_ffns(self, name: str) -> None:
        with pytest.raises(NotAvailableError, match=r"is used by \d layers.*Use magnitude_weights"):
            wanda_weights(tiny_causal_lm(name), text(4), 0.5, scope="ffn")

    def test_no_gate(self) -> None:
        with pytest.raises(NotAvailableError, match=r"h\.0\.mlp has no gate; DaSS .*Use wanda_weights"):
            dass_weights(tiny("gpt2"), text(4), 0.5)

    def test_arguments(self) -> None:
        model = tiny("llama")
        with pytest.raises(UsageError, match=r"scope must be 'ffn' .* or 'linear' .*; got 'all'"):
            wanda_weights(model, text(4), 0.5, scope="all")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=r"in batches of at least 1; got 4 windows and batch_size 0"):
            wanda_weights(model, text(4), 0.5, scope="ffn", batch_size=0)
        with pytest.raises(UsageError, match=r"got 0 windows"):
            wanda_weights(model, text(4)[:0], 0.5, scope="ffn")
        with pytest.raises(UsageError, match=r"alpha must be finite and not negative; got -1"):
            dass_weights(model, text(4), 0.5, alpha=-1)
        with pytest.raises(UsageError, match=r"has 32 inputs, which is no multiple of 5; the pattern 2:5 does not fit"):
            wanda_weights(model, text(4), "2:5", scope="ffn")
        with pytest.raises(UsageError, match=r"128 columns at a time; 1:3 does not divide that"):
            sparsegpt_weights(tiny("llama", intermediate_size=48, hidden_size=24), text(4), "1:3", scope="ffn")

    def test_weights_that_are_not_finite(self) -> None:
        model = tiny("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
        with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj holds NaN or infinity"):
            magnitude_weights(model, 0.5, scope="ffn")

    def test_offloaded_weights(self) -> None:
        from accelerate import cpu_offload

        model = cpu_offload(tiny("llama"), execution_device=torch.device("cpu"))
        with pytest.raises(NotAvailableError, match=r"is offloaded by accelerate .*Load the model without offload"):
            wanda_weights(model, text(4), 0.5, scope="ffn")

    def test_too_little_text_for_second_moments_is_told(self) -> None:
        with pytest.warns(
            UserWarning, match=r"6 of 6 matrices are of fewer than 4 tokens per input \(.*: 64 tokens for"
        ):
            sparsegpt_weights(tiny("llama"), text(4), 0.5, scope="ffn")


def test_targets_of_a_scope() -> None:
    found = find_targets(tiny("llama"), "ffn")
    assert [t.matrix.path for t in found.inside("model.layers.1")] == [
        f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    assert len({t.signal for t in found.all}) == 4  # gate and up read the same
