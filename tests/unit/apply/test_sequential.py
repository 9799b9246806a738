"""Sequential reconstruction against whole forwards written out, and the laws that it must keep."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffnscope.apply import streams
from ffnscope.apply.columns import columns_replaced
from ffnscope.apply.mask import masked
from ffnscope.apply.reconstruction import Reconstruction
from ffnscope.apply.refit import LeastSquares, Moments, refit_down
from ffnscope.apply.sequential import SequentialOptions, reconstruct_sequential
from ffnscope.calibrate.collect import collect
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import ArtifactError, NonFiniteError, NotAvailableError, UsageError
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.probe import layer_path
from ffnscope.ffn.projection import down_projection, weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.plan.build import build_plan
from ffnscope.scoring import score
from ffnscope.types import FFNSite, PruningPlan
from offload import KINDS
from reference import exact, padded, text
from tiny import logits, tiny
from tiny_all import tiny_causal_lm
from tiny_moe import tiny_moe

DENSE_ONE = ["llama", "llama_bias", "gpt2", "gpt_neox", "phi", "gemma2", "opt_projected"]
MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}


def fixed(**changes: Any) -> SequentialOptions:
    return SequentialOptions(**{"damping": 1e-2, **changes})


def plan_of(model: Any, sparsity: float = 0.5, seed: int = 0) -> PruningPlan:
    return build_plan(score(model, find_sites(model), "random", seed=seed), sparsity)


def whole(found: Reconstruction) -> dict[FFNSite, Tensor]:
    """Down columns [d_model, d_ff] with zeros for removed channels."""
    return {s: v.new_zeros(s.d_model, s.d_ff).index_copy_(1, found.plan.kept[s], v) for s, v in found.down.items()}


@contextlib.contextmanager
def pruned(model: Any, found: Reconstruction) -> Iterator[None]:
    with masked(model, found.plan), columns_replaced(model, whole(found)):
        yield


def states(model: Any, windows: Windows, paths: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What modules read and what they put out in a whole forward, rows of valid tokens."""
    reads: dict[str, Tensor] = {}
    writes: dict[str, Tensor] = {}

    def rows(value: Any) -> Tensor:
        value = value[0] if isinstance(value, tuple) else value
        return value.reshape(*windows.valid.shape, -1)[windows.valid].clone()

    def hook(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            reads[path], writes[path] = rows(args[0]), rows(output)

        return note

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    mask = {} if bool(windows.valid.all()) else {"attention_mask": windows.valid.long()}
    with torch.no_grad():
        model(input_ids=windows.input_ids, use_cache=False, **mask)
    for handle in handles:
        handle.remove()
    return reads, writes


def naive(model: Any, windows: Windows, plan: PruningPlan, mix: float, *, of_block: bool, damping: float = 1e-2) -> Any:
    """New columns by whole forwards of the model, one after the other."""
    found: dict[FFNSite, Tensor] = {}
    for site, kept in plan.kept.items():
        down = f"{site.path}.{site.down}"
        block = down[: down.index(f".{site.layer}.") + 2]
        where = block if of_block else down
        _, dense = states(model, windows, [where])
        zeroed = {s: v.new_zeros(s.d_model, s.d_ff).index_copy_(1, plan.kept[s], v) for s, v in found.items()}
        with columns_replaced(model, zeroed):
            h, own = states(model, windows, [down, where])
        rows, shift = h[down], mix * (dense[where] - own[where])
        sums = Moments(rows.T @ rows, len(rows), shift.T @ rows, shift.square().sum(0))
        found[site] = refit_down(weights_of(model, site).down, kept, sums, damping)
    return found


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: Any, before: dict[str, Tensor]) -> bool:
    clean = not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    return clean and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*fewer tokens than 4 d_ff")
class TestAgainstWholeForwards:
    @pytest.mark.parametrize("mix", [0.0, 0.35, 1.0])
    @pytest.mark.parametrize("arch", ["llama", "llama_bias", "gpt2", "gpt_neox", "phi", "opt", "falcon", "gpt_neo"])
    def test_families_that_add_the_output_as_it_is(self, arch: str, mix: float) -> None:
        model = exact(arch)
        plan, windows = plan_of(model), text(8)
        before = state(model)
        found = reconstruct_sequential(model, windows, plan, options=fixed(target=mix))
        assert unchanged(model, before)
        wanted = naive(model, windows, plan, mix, of_block=True)
        for site, value in wanted.items():
            assert found.facts["sites"][site.name]["target"] == "block"
            torch.testing.assert_close(found.down[site], value, rtol=1e-8, atol=1e-8)
        assert found.plan.kept.keys() == plan.kept.keys()

    @pytest.mark.parametrize("mix", [0.0, 0.35])
    @pytest.mark.parametrize("arch", ["gemma2", "gemma3_text", "olmo2", "opt_projected", "bert"])
    def test_families_with_a_norm_behind(self, arch: str, mix: float) -> None:
        model = tiny(arch, dtype=torch.float64, **(MIXED if arch.startswith("gemma") else {}))
        plan, windows = plan_of(model), text(8)
        found = reconstruct_sequential(model, windows, plan, options=fixed(target=mix))
        for site, value in naive(model, windows, plan, mix, of_block=False).items():
            assert found.facts["sites"][site.name]["target"] == "ffn"
            torch.testing.assert_close(found.down[site], value, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(("arch", "of_block"), [("llama", True), ("gemma2", False)])
    def test_both_streams_go_on(self, arch: str, of_block: bool) -> None:
        model = tiny(arch, dtype=torch.float64, num_hidden_layers=4)
        plan, windows = plan_of(model), text(8)
        found = reconstruct_sequential(model, windows, plan, options=fixed(target=0.5))
        for site, value in naive(model, windows, plan, 0.5, of_block=of_block).items():
            torch.testing.assert_close(found.down[site], value, rtol=1e-6, atol=1e-6)

    def test_an_output_that_is_multiplied_by_a_number(self) -> None:
        model = tiny_causal_lm("granite").double()
        model.config.residual_multiplier = 0.25
        for layer in model.model.layers:
            layer.residual_multiplier = 0.25
        plan, windows = plan_of(model), text(8)
        found = reconstruct_sequential(model, windows, plan, options=fixed(target="dense"))
        sites = list(plan.kept)
        dense = states(model, windows, ["model.layers.1"])[1]["model.layers.1"]
        down = f"{sites[1].path}.down_proj"
        with columns_replaced(model, {sites[0]: whole(found)[sites[0]]}):
            h, own = states(model, windows, [down, "model.layers.1"])
        rows, shift = h[down], (dense - own["model.layers.1"]) / 0.25
        sums = Moments(rows.T @ rows, len(rows), shift.T @ rows, shift.square().sum(0))
        wanted = refit_down(weights_of(model, sites[1]).down, plan.kept[sites[1]], sums, 1e-2)
        torch.testing.assert_close(found.down[sites[1]], wanted, rtol=1e-5, atol=1e-5)

    def test_padding_does_not_count(self) -> None:
        model = exact("llama")
        plan, windows = plan_of(model), padded([16, 5, 9, 12, 3, 16])
        found = reconstruct_sequential(model, windows, plan, options=fixed(batch_size=2))
        assert found.facts["sites"]["model.layers.0.mlp"]["tokens"] == windows.n_tokens
        for site, value in naive(model, windows, plan, 0.35, of_block=True).items():
            torch.testing.assert_close(found.down[site], value, rtol=1e-8, atol=1e-8)

    def test_activations_that_do_not_fit_are_computed_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = exact("llama")
        plan, windows = plan_of(model), text(8)
        kept = reconstruct_sequential(model, windows, plan, options=fixed())
        monkeypatch.setattr(streams, "HELD_BYTES", 0)
        again = reconstruct_sequential(model, windows, plan, options=fixed())
        for site, value in kept.down.items():
            torch.testing.assert_close(again.down[site], value, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("arch", DENSE_ONE)
    def test_batches_do_not_matter(self, arch: str) -> None:
        model = tiny(arch, dtype=torch.float64)
        plan, windows = plan_of(model), text(17)
        one, other = (
            reconstruct_sequential(model, windows, plan, options=SequentialOptions(batch_size=b)) for b in (1, 5)
        )
        for site, value in one.down.items():
            torch.testing.assert_close(other.down[site], value, rtol=1e-6, atol=1e-6)
            assert one.facts["sites"][site.name]["damping"] == other.facts["sites"][site.name]["damping"]


@pytest.mark.filterwarnings("ignore:.*fewer tokens than 4 d_ff")
class TestLaws:
    @pytest.mark.parametrize("arch", DENSE_ONE)
    def test_nothing_removed_and_the_own_target_change_nothing(self, arch: str) -> None:
        model = tiny(arch, dtype=torch.float64)
        found = reconstruct_sequential(model, text(16), plan_of(model, 0.0), options=SequentialOptions(target="own"))
        for site, value in found.down.items():
            torch.testing.assert_close(value, weights_of(model, site).down, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "phi"])
    @pytest.mark.parametrize("target", ["own", 0.35, "dense"])
    def test_copies_of_channels_cost_nothing(self, arch: str, target: Any) -> None:
        model = tiny(arch, dtype=torch.float64)
        kept: dict[FFNSite, Tensor] = {}
        for site in find_sites(model):
            weights = weights_of(model, site)
            half = site.d_ff // 2
            for rows in (weights.gate, weights.up, weights.gate_bias, weights.up_bias):
                if rows is not None:
                    rows[half:] = rows[:half]
            kept[site] = torch.arange(half)
        plan = replace(plan_of(model), kept=kept)
        found = reconstruct_sequential(model, text(32), plan, options=fixed(target=target, damping=1e-12))
        dense = logits(model)
        with masked(model, plan):
            assert float((logits(model) - dense).abs().max()) > 1e-2
        with pruned(model, found):
            torch.testing.assert_close(logits(model), dense, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "gpt_neox", "phi", "opt", "qwen3", "starcoder2"])
    def test_targets(self, arch: str) -> None:
        """Mean square distance of the last hidden states to the dense ones, on calibration tokens."""
        model = tiny(arch, dtype=torch.float64, seed=2)
        plan, windows = plan_of(model), text(64)
        last = layer_path(find_sites(model)[-1].path) or ""
        dense = states(model, windows, [last])[1][last]

        def distance(found: Reconstruction) -> float:
            with pruned(model, found):
                return float((states(model, windows, [last])[1][last] - dense).square().sum(1).mean())

        own, dense_target = (
            distance(reconstruct_sequential(model, windows, plan, options=fixed(target=t, damping=1e-3)))
            for t in ("own", "dense")
        )
        columns: dict[FFNSite, Tensor] = {}
        for site, kept in plan.kept.items():
            down = f"{site.path}.{site.down}"
            h = states(model, windows, [down])[0][down]
            columns[site] = refit_down(weights_of(model, site).down, kept, Moments(h.T @ h, len(h)), 1e-3)
        one_shot = distance(Reconstruction(plan, columns))
        with masked(model, plan):
            bare = float((states(model, windows, [last])[1][last] - dense).square().sum(1).mean())
        assert own < bare
        assert dense_target < own
        assert dense_target <= one_shot
        assert own <= 1.02 * one_shot

    def test_the_fact_of_the_error_is_the_error(self) -> None:
        model = exact("llama")
        plan, windows = plan_of(model), text(8)
        found = reconstruct_sequential(model, windows, plan, options=fixed(target="own"))
        site = next(iter(plan.kept))
        h = states(model, windows, ["model.layers.0.mlp.down_proj"])[0]["model.layers.0.mlp.down_proj"]
        old = weights_of(model, site).down
        facts = found.facts["sites"][site.name]
        kept = plan.kept[site]
        sums = Moments(h.T @ h, len(h))
        power = float((h @ old.T).square().sum(1).mean())
        assert facts["power"] == pytest.approx(power)
        assert facts["error"] * power == pytest.approx(
            LeastSquares.of(old, kept, sums).error(found.down[site]), rel=1e-9
        )
        for name, columns in (("error", found.down[site]), ("error_without", old[:, kept])):
            missed = h @ old.T - h[:, kept] @ columns.T
            assert facts[name] * power == pytest.approx(float(missed.square().sum(1).mean()))

    def test_old_columns_stay_where_new_ones_are_worse_on_held_out_tokens(self) -> None:
        model = tiny("llama")
        windows = text(8, 4)  # 28 tokens to fit 24 columns
        found = reconstruct_sequential(model, windows, plan_of(model), options=SequentialOptions(target="own"))
        rows = found.facts["sites"]
        assert all(row["held_out"] and row["error"] <= row["error_without"] for row in rows.values())
        for site, kept in found.plan.kept.items():
            same = torch.equal(found.down[site], weights_of(model, site).down[:, kept])
            assert same != rows[site.name]["refitted"]


class TestExperts:
    @pytest.mark.filterwarnings("ignore:.*fewer tokens than 4 d_ff")
    @pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "aria_text", "gpt_oss", "dbrx", "jetmoe"])
    def test_each_on_its_own_tokens_of_the_pruned_stream(self, name: str) -> None:
        model = tiny_moe(name, dtype=torch.float64)
        plan, windows = plan_of(model), text(16)
        before = state(model)
        found = reconstruct_sequential(model, windows, plan, options=fixed(target="own"))
        assert unchanged(model, before)
        with frozen(model):
            for layer in (0, 1):
                sites = [s for s in plan.kept if s.layer == layer]
                done = {s: v for s, v in whole(found).items() if s.layer < layer}
                with columns_replaced(model, done):
                    stats = collect(model, windows, ["h_outer"], sites=sites)
                for site in sites:
                    sums = Moments(stats[site].total("h_outer"), stats[site].counts["h_outer"])
                    wanted = refit_down(weights_of(model, site).down, plan.kept[site], sums, 1e-2)
                    torch.testing.assert_close(found.down[site], wanted, rtol=1e-5, atol=1e-5)
                    assert found.facts["sites"][site.name]["tokens"] == sums.n_tokens

    @pytest.mark.filterwarnings("ignore:.*fewer tokens than 4 d_ff")
    def test_one_without_tokens_stays_whole(self) -> None:
        model = tiny_moe("deepseek_v3")
        model.model.layers[1].mlp.gate.e_score_correction_bias[2] = -1e4
        plan = plan_of(model)
        with pytest.warns(UserWarning, match=r"1 of \d+ FFNs were reached by no token .*layers.1.mlp.experts.2"):
            found = reconstruct_sequential(model, text(16), plan)
        site = next(s for s in plan.kept if s.name == "model.layers.1.mlp.experts.2")
        assert plan.kept[site].numel() < site.d_ff
        assert found.plan.kept[site].tolist() == list(range(site.d_ff))
        assert torch.equal(found.down[site], weights_of(model, site).down)
        assert found.facts["sites"][site.name] == {"target": "own", "unreached": True, "tokens": 0}
        others = [s for s in plan.kept if s != site]
        assert all(torch.equal(found.plan.kept[s], plan.kept[s]) for s in others)


@pytest.mark.filterwarnings("ignore:.*fewer tokens than 4 d_ff")
class TestCost:
    @pytest.mark.parametrize(("target", "blocks"), [("own", 3), (0.35, 5)])
    def test_two_forwards(self, target: Any, blocks: int) -> None:
        """Three blocks: each once for each stream, but the first, where both are the same."""
        model = tiny("llama", num_hidden_layers=3)
        plan, windows = plan_of(model), text(16, 64)
        tokens: list[int] = []
        for layer in model.model.layers:
            layer.mlp.down_proj.register_forward_hook(
                lambda module, args, output: tokens.append(output[..., 0].numel())
            )
        head: list[int] = []
        model.lm_head.register_forward_hook(lambda module, args, output: head.append(1))
        done: list[tuple[int, int]] = []
        reconstruct_sequential(
            model, windows, plan, options=fixed(target=target), on_block=lambda *now: done.append(now)
        )
        pieces = [n for n in tokens if n < 4 * 64]  # what proves that the blocks are a chain
        assert sum(n for n in tokens if n == 4 * 64) == blocks * 16 * 64
        assert sum(pieces) <= 3 * 3 * 2 * 64 * 2
        assert len(head) == 2
        assert done == [(1, 3), (2, 3), (3, 3)]

    def test_blocks_behind_the_last_ffn_of_the_plan_do_not_run(self) -> None:
        model = tiny("llama", num_hidden_layers=3)
        plan = plan_of(model)
        first, second, _ = plan.kept
        some = replace(plan, kept={second: plan.kept[second]})
        done: list[tuple[int, int]] = []
        found = reconstruct_sequential(model, text(8), some, options=fixed(), on_block=lambda *now: done.append(now))
        assert done == [(1, 2), (2, 2)]
        assert list(found.down) == [second]
        assert first not in found.plan.kept


@pytest.mark.filterwarnings("ignore:.*fewer tokens than 4 d_ff")
class TestResume:
    @pytest.mark.parametrize("arch", ["llama", "gemma2"])
    @pytest.mark.parametrize("target", ["own", 0.35])
    @pytest.mark.parametrize("stop", [1, 2])
    def test_after_an_interrupt(self, arch: str, target: Any, stop: int, tmp_path: Path) -> None:
        model = tiny(arch, num_hidden_layers=3)
        plan, windows = plan_of(model), text(16)
        plain = reconstruct_sequential(model, windows, plan, options=SequentialOptions(target=target))
        options = SequentialOptions(target=target, checkpoint=tmp_path / "state")
        before = state(model)

        def interrupt(done: int, total: int) -> None:
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            reconstruct_sequential(model, windows, plan, options=options, on_block=interrupt)
        assert unchanged(model, before)
        files = sorted((tmp_path / "state").iterdir())
        assert [f.name for f in files] == [f"block_{i:04d}.safetensors" for i in range(stop)]
        stamps = [f.stat().st_mtime_ns for f in files]

        def look(done: int, total: int) -> None:
            if done == stop:
                assert [f.stat().st_mtime_ns for f in files] == stamps  # read, not made again

        again = reconstruct_sequential(model, windows, plan, options=options, on_block=look)
        assert not (tmp_path / "state").exists()
        for site, value in plain.down.items():
            assert torch.equal(again.down[site], value)
        assert again.facts == plain.facts

    def test_files_of_other_arguments_are_not_used(self, llama: Any, tmp_path: Path) -> None:
        plan, windows = plan_of(llama), text(8)

        def stopping(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            reconstruct_sequential(
                llama, windows, plan, options=fixed(damping=0.1, checkpoint=tmp_path), on_block=stopping
            )
        found = reconstruct_sequential(llama, windows, plan, options=fixed(checkpoint=tmp_path))
        plain = reconstruct_sequential(llama, windows, plan, options=fixed())
        assert all(torch.equal(found.down[s], plain.down[s]) for s in plan.kept)

    def test_a_damaged_file_is_told(self, llama: Any, tmp_path: Path) -> None:
        (tmp_path / "block_0000.safetensors").write_bytes(b"nothing")
        with pytest.raises(ArtifactError, match=r"block_0000.*Delete it, and the block is reconstructed again"):
            reconstruct_sequential(llama, text(8), plan_of(llama), options=fixed(checkpoint=tmp_path))

    def test_what_else_is_in_the_folder_stays(self, llama: Any, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("mine")
        reconstruct_sequential(llama, text(8), plan_of(llama), options=fixed(checkpoint=tmp_path))
        assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]

    @pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
    def test_the_model_after_an_interrupt_inside_a_block(self, arch: str) -> None:
        model = tiny(arch)
        before, calls = state(model), [0]
        down = down_projection(model, find_sites(model)[0])
        plan = plan_of(model)

        for stop in range(1, 16):

            def interrupt(module: nn.Module, args: tuple[Any, ...], output: Tensor, stop: int = stop) -> None:
                calls[0] += 1
                if calls[0] == stop:
                    raise KeyboardInterrupt

            calls[0] = 0
            handle = down.register_forward_hook(interrupt)
            with contextlib.suppress(KeyboardInterrupt):
                reconstruct_sequential(model, text(8), plan, options=fixed(batch_size=2))
            handle.remove()
            assert calls[0] >= min(stop, 8)
            assert unchanged(model, before)


@pytest.mark.filterwarnings("ignore:.*fewer tokens than 4 d_ff")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["llama_bias", "gemma2"])
def test_offloaded_weights_give_the_same(arch: str, kind: str, tmp_path: Path) -> None:
    resident, offloaded = tiny(arch), KINDS[kind](arch, tmp_path)
    plan = plan_of(resident)
    wanted = reconstruct_sequential(resident, text(8), plan, options=fixed())
    found = reconstruct_sequential(offloaded, text(8), plan, options=fixed())
    for site, value in wanted.down.items():
        torch.testing.assert_close(found.down[site], value)


class TestRefusals:
    def test_few_tokens_are_told(self, llama: Any) -> None:
        with pytest.warns(
            UserWarning, match=r"2 of 2 FFNs .*fewer tokens than 4 d_ff \(model.layers.0.mlp: 128 tokens"
        ):
            reconstruct_sequential(llama, text(8), plan_of(llama))

    @pytest.mark.parametrize(
        ("name", "why"),
        [("bitnet", "a norm .* stands before its down projection"), ("zamba", "2 layers share its parameters")],
    )
    def test_by_name(self, name: str, why: str) -> None:
        model = tiny_causal_lm(name)
        with pytest.raises(NotAvailableError, match=why):
            reconstruct_sequential(model, text(8), plan_of(model))

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"target": 1.5}, "target must be 'own', 'dense' or a share between 0 and 1; got 1.5"),
            ({"target": "mine"}, "got 'mine'"),
            ({"target": float("nan")}, "got nan"),
            ({"damping": 0.0}, "damping must be positive"),
            ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ],
    )
    def test_options(self, options: dict[str, Any], told: str) -> None:
        with pytest.raises(UsageError, match=told):
            SequentialOptions(**options)

    def test_targets_in_words_are_numbers(self) -> None:
        assert [SequentialOptions(target=t).mix for t in ("own", "dense", 0.35, 1)] == [0.0, 1.0, 0.35, 1.0]

    def test_no_text_and_no_plan(self, llama: Any) -> None:
        plan = plan_of(llama)
        with pytest.raises(UsageError, match="at least one window"):
            reconstruct_sequential(llama, text(8)[:0], plan)
        with pytest.raises(UsageError, match="one FFN in the plan"):
            reconstruct_sequential(llama, text(8), replace(plan, kept={}))

    @pytest.mark.filterwarnings("ignore:.*fewer tokens than 4 d_ff")
    def test_overflow_names_the_ffn(self, llama: Any) -> None:
        plan = plan_of(llama)
        with torch.no_grad():
            llama.model.layers[1].mlp.up_proj.weight[0] = float("inf")
        with pytest.raises(NonFiniteError, match=r"what model.layers.1 puts out is NaN or infinite"):
            reconstruct_sequential(llama, text(8), plan)

    @pytest.mark.filterwarnings("ignore:.*fewer tokens than 4 d_ff")
    def test_overflow_on_later_text_names_the_ffn(self, llama: Any) -> None:
        plan, windows = plan_of(llama), text(8)
        windows.input_ids[windows.input_ids == 7] = 8
        windows.input_ids[6, 3] = 7
        with torch.no_grad():
            llama.model.embed_tokens.weight[7] = float("nan")
        with pytest.raises(NonFiniteError, match=r"model.layers.0.mlp: least squares"):
            reconstruct_sequential(llama, windows, plan)
