"""New rows of gate and up beside new columns: in memory, for good and reloaded they are one model, on every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope.apply.distill import Distillation
from ffnscope.apply.export import save_model
from ffnscope.apply.mask import masked
from ffnscope.apply.reconstruction import (
    Reconstruction,
    read_reconstruction,
    reconstruct_,
    reconstructed,
    write_reconstruction,
)
from ffnscope.apply.rows import ChannelRows
from ffnscope.apply.sequential import SequentialOptions, reconstruct_sequential
from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.ffn.projection import joined, weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.plan.build import build_plan
from ffnscope.scoring import score
from ffnscope.types import FFNSite, FFNWeights
from offload import KINDS
from reconstructions import EXACT, VISIBLE, MakePlan, distance, make, reloaded, state, unchanged
from reference import text
from tiny import logits, tiny
from tiny_moe import tiny_moe

# gated, with biases, fused, plain with biases, Conv1D, norms behind; experts that are modules
DENSE = ["llama", "llama_bias", "phi3", "glm", "opt", "gpt2", "gemma2", "falcon"]
layouts = pytest.mark.parametrize("name", [*DENSE, "listed"])
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fewer tokens than 4 d_ff", "ignore:experts of one layer lie in", "ignore:.*no token of the pruned"
)


def noisy(value: Tensor, seed: int) -> Tensor:
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value)
    return (value + noise / 4).clone()


def drawn(model: Any, random_plan: MakePlan, sparsity: float = 0.5, **options: Any) -> Reconstruction:
    """Noise in all weights of the channels that a random plan keeps."""
    plan = random_plan(model, sparsity, **options)
    down: dict[FFNSite, Tensor] = {}
    rows: dict[FFNSite, ChannelRows] = {}
    bias: dict[FFNSite, Tensor] = {}
    for i, (site, kept) in enumerate(plan.kept.items()):
        dense = weights_of(model, site)
        down[site] = noisy(dense.down[:, kept], i)
        new = {n: noisy(v[kept], i + j) for j, n in enumerate(NAMES, 1) if (v := getattr(dense, n)) is not None}
        rows[site] = ChannelRows(**new)
        if dense.down_bias is not None:
            bias[site] = noisy(torch.zeros_like(dense.down_bias), i + 9)
    return Reconstruction(plan, down, bias, {"method": "sequential", "trained": True}, rows)


NAMES = ("up", "gate", "up_bias", "gate_bias")


def holds(weights: FFNWeights, found: Reconstruction, site: FFNSite, channels: Tensor) -> bool:
    rows = all(torch.equal(getattr(weights, n)[channels], v) for n, v in found.rows[site].tensors.items())
    return rows and torch.equal(weights.down[:, channels], found.down[site])


@layouts
class TestRows:
    def test_in_memory_for_good_and_reloaded(self, name: str, random_plan: MakePlan, tmp_path: Path) -> None:
        model = make(name)
        found = drawn(model, random_plan)
        without = replace(found, rows={})
        with reconstructed(model, without):
            columns_only = logits(model)
        with reconstructed(model, found):
            in_memory = logits(model)
            for site, kept in found.plan.kept.items():
                assert holds(weights_of(model, site), found, site, kept)
        assert distance(in_memory, columns_only) > VISIBLE
        assert distance(logits(reconstruct_(model, found)), in_memory) < EXACT
        for site in find_sites(model):
            old = next(s for s in found.plan.kept if s.name == site.name)
            assert holds(weights_of(model, site), found, old, torch.arange(site.d_ff))
        if name != "listed":  # code that is not part of transformers
            save_model(model, None, tmp_path / "out", plan=found.told_plan)
            assert distance(logits(reloaded(tmp_path / "out")), in_memory) < EXACT

    @pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
    def test_no_trace(self, name: str, random_plan: MakePlan, failure: Any) -> None:
        model = make(name)
        before, found, dense = state(model), drawn(model, random_plan), logits(model)
        if failure is None:
            with reconstructed(model, found), masked(model, random_plan(model, 0.75)):
                assert not unchanged(model, before)
        else:
            with pytest.raises(failure), reconstructed(model, found):
                raise failure
        assert unchanged(model, before) and torch.equal(logits(model), dense)

    def test_files(self, name: str, random_plan: MakePlan, tmp_path: Path) -> None:
        model = make(name)
        found = drawn(model, random_plan)
        write_reconstruction(tmp_path / "r.safetensors", found)
        again = read_reconstruction(tmp_path / "r.safetensors")
        assert again.facts == found.facts and again.name == found.name == "sequential refit, distilled (trained)"
        assert again.tensors.keys() == found.tensors.keys()
        assert all(torch.equal(value, again.tensors[key]) for key, value in found.tensors.items())
        with reconstructed(model, found):
            first = logits(model)
        with reconstructed(model, again):
            assert torch.equal(logits(model), first)

    def test_different_widths(self, name: str, random_plan: MakePlan, tmp_path: Path) -> None:
        model = make(name)
        found = drawn(model, random_plan, 0.51, allocator="global")
        assert len(set(found.plan.widths.values())) > 1
        with reconstructed(model, found):
            in_memory = logits(model)
        reconstruct_(model, found)
        assert distance(logits(model), in_memory) < EXACT
        if name != "listed":
            save_model(model, None, tmp_path / "out", plan=found.told_plan)
            assert distance(logits(load_tiny(tmp_path / "out")), in_memory) < EXACT


def load_tiny(folder: Path) -> Any:
    """A checkpoint of FFNs of different widths, without its tokenizer."""
    from transformers import AutoConfig

    from ffnscope.ffn.narrowed import causal_lm

    return causal_lm(AutoConfig.from_pretrained(folder)).from_pretrained(folder).eval()


@pytest.mark.parametrize("arch", ["llama_bias", "phi3", "gpt2"])
class TestTrained:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_distilled_in_memory_for_good_and_reloaded(self, arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
        model = tiny(arch, dtype=dtype)
        plan = build_plan(score(model, find_sites(model), "random", seed=0), 0.5)
        trains = Distillation(epochs=4, learning_rate=1e-2, batch_tokens=64)
        before = state(model)
        found = reconstruct_sequential(model, text(32), plan, options=SequentialOptions(distillation=trains))
        assert unchanged(model, before) and found.rows.keys() == plan.kept.keys()
        assert {value.dtype for value in found.tensors.values()} == {dtype}
        with reconstructed(model, found):
            in_memory = logits(model)
        assert unchanged(model, before)
        save_model(reconstruct_(model, found), None, tmp_path / "out", plan=found.told_plan)
        close = EXACT if dtype == torch.float32 else 0.05
        assert distance(logits(reloaded(tmp_path / "out", dtype=dtype)), in_memory) < close
        card = (tmp_path / "out" / "README.md").read_text()
        assert "| kind | sequential refit, distilled (trained) |" in card
        assert "**Trained**: in 2 of 2 FFNs" in card and "on 512 tokens" in card and "Nothing was trained" not in card
        assert "| distillation: epochs | 4 |" in card

    @pytest.mark.parametrize("kind", KINDS)
    def test_offloaded(self, arch: str, kind: str, random_plan: MakePlan, tmp_path: Path) -> None:
        resident, offloaded = tiny(arch), KINDS[kind](arch, tmp_path)
        found = drawn(resident, random_plan)
        with reconstructed(resident, found):
            expected = logits(resident)
        with reconstructed(offloaded, found):
            assert torch.equal(logits(offloaded), expected)
        assert torch.equal(logits(offloaded), logits(tiny(arch)))
        assert distance(logits(reconstruct_(offloaded, found)), expected) < EXACT


def test_a_file_of_columns_alone_has_no_rows(llama: Any, random_plan: MakePlan, tmp_path: Path) -> None:
    found = drawn(llama, random_plan)
    write_reconstruction(tmp_path / "old.safetensors", replace(found, rows={}, facts={"method": "sequential"}))
    again = read_reconstruction(tmp_path / "old.safetensors")
    assert again.rows == {} and again.name == "sequential refit" and again.down.keys() == found.down.keys()


@pytest.mark.parametrize(
    ("fused", "rows"),
    [("gate_up", [[0], [1], [10], [11]]), ("up_gate", [[10], [11], [0], [1]]), ("interleaved", [[0], [10], [1], [11]])],
)
def test_rows_of_one_matrix(fused: Any, rows: list[list[int]]) -> None:
    site = FFNSite(0, "mlp", "both", "both", "down", d_model=1, d_ff=2, fused=fused)
    gate, up = torch.tensor([[0], [1]]), torch.tensor([[10], [11]])
    assert joined(site, gate, up).tolist() == rows
    assert joined(site, gate[:, 0], up[:, 0]).tolist() == [row[0] for row in rows]


class TestRefused:
    def test_rows_that_do_not_fit(self, llama: Any, random_plan: MakePlan) -> None:
        found = drawn(llama, random_plan)
        site = next(iter(found.rows))
        rows = found.rows[site]
        for wrong, told in (
            (replace(rows, up=rows.up[1:]), r"expected up \(24, 32\), got \(23, 32\)"),
            (replace(rows, gate=None), "no gate for an FFN with one"),
            (replace(rows, gate_bias=torch.zeros(3)), r"expected gate_bias \(24,\), got \(3,\)"),
        ):
            with pytest.raises(UsageError, match=told):
                replace(found, rows={site: wrong})
        with pytest.raises(NonFiniteError, match="rows hold NaN"):
            replace(found, rows={site: replace(rows, up=torch.full_like(rows.up, torch.nan))})
        with pytest.raises(UsageError, match="which is not in the plan"):
            replace(found, rows={replace(site, path="elsewhere"): rows})

    def test_experts_in_one_tensor(self, random_plan: MakePlan) -> None:
        model = tiny_moe("mixtral")
        plan = random_plan(model)
        site = next(iter(plan.kept))
        rows = ChannelRows(torch.zeros(plan.widths[site], site.d_model), torch.zeros(plan.widths[site], site.d_model))
        with pytest.raises(UsageError, match="an expert in shared parameters"):
            Reconstruction(plan, {}, rows={site: rows})
