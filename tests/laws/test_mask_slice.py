"""A mask and a slice of the same plan are one model; a mask leaves no trace; a saved slice loads anywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope.apply.export import prune_, save_model
from ffnscope.apply.mask import masked
from ffnscope.apply.slice import slice_
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.types import PruningPlan
from tiny import ARCHITECTURES, LAYERS, logits, tiny, tokens

MakePlan = Callable[..., PruningPlan]
EXACT, VISIBLE = 1e-4, 1e-2
# bloom has no width in its config: 4 * hidden_size is written in its code
RELOADABLE = [arch for arch in ARCHITECTURES if arch != "bloom"]

pytestmark = pytest.mark.parametrize("arch", ARCHITECTURES)


def distance(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).abs().max())


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model: Any, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


def reloaded(path: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


@pytest.fixture
def model(arch: str) -> Iterator[Any]:
    yield tiny(arch)


class TestMaskEqualsSlice:
    @pytest.mark.parametrize("allocator", ["local", "global"])
    def test_logits(self, model: Any, random_plan: MakePlan, allocator: str) -> None:
        plan = random_plan(model, allocator=allocator)
        dense = logits(model)
        with masked(model, plan):
            by_mask = logits(model)
        other = random_plan(model, seed=1, allocator=allocator)
        assert plan.sparsity == other.sparsity == 0.25
        by_slice = logits(slice_(copy.deepcopy(model), plan))
        assert distance(by_mask, by_slice) < EXACT
        assert distance(by_mask, dense) > VISIBLE
        assert distance(by_mask, logits(slice_(model, other))) > VISIBLE  # the same number of other channels

    def test_weights_are_really_gone(self, model: Any, random_plan: MakePlan) -> None:
        plan = random_plan(model, 0.5)
        before = {s: weights_of(model, s) for s in plan.kept}
        size = sum(p.numel() for p in model.parameters())
        slice_(model, plan)
        gone = 0
        for old, (site, kept) in zip(before.values(), plan.kept.items(), strict=True):
            new = find_sites(model)[site.layer]
            assert new.d_ff == kept.numel() == site.d_ff // 2
            found = weights_of(model, new)
            assert torch.equal(found.up, old.up[kept]) and torch.equal(found.down, old.down[:, kept])
            rows = [t for t in (old.gate, old.up, old.down.T, old.gate_bias, old.up_bias) if t is not None]
            gone += sum(t[kept.numel() :].numel() for t in rows)
        assert size - sum(p.numel() for p in model.parameters()) == gone

    def test_no_sparsity_is_the_identity(self, model: Any, random_plan: MakePlan) -> None:
        before, dense, plan = state(model), logits(model), random_plan(model, 0.0)
        with masked(model, plan):
            assert same_state(model, before)
        slice_(model, plan)
        assert same_state(model, before) and torch.equal(logits(model), dense)

    def test_twice_sliced(self, model: Any, random_plan: MakePlan) -> None:
        slice_(model, random_plan(model, 0.5))
        plan = random_plan(model, 0.5, seed=3)
        with masked(model, plan):
            by_mask = logits(model)
        assert distance(by_mask, logits(slice_(model, plan))) < EXACT
        assert {s.d_ff for s in find_sites(model)} == {12}


class TestAMaskLeavesNoTrace:
    @pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
    def test_bit_identical_afterwards(self, model: Any, random_plan: MakePlan, failure: Any) -> None:
        before, dense, plan = state(model), logits(model), random_plan(model)
        flags = [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()]
        if failure is None:
            with masked(model, plan):
                assert not same_state(model, before)
        else:
            with pytest.raises(failure), masked(model, plan):
                raise failure
        assert same_state(model, before) and torch.equal(logits(model), dense)
        assert [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()] == flags
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_nested(self, model: Any, random_plan: MakePlan) -> None:
        before = state(model)
        first, second = random_plan(model), random_plan(model, seed=1)
        with masked(model, first):
            outer = state(model)
            with masked(model, second):
                both = logits(model)
            assert same_state(model, outer)
        assert same_state(model, before)
        with masked(model, second), masked(model, first):
            assert torch.equal(logits(model), both)


class TestSavedModels:
    def test_one_width(self, arch: str, model: Any, random_plan: MakePlan, tmp_path: Path) -> None:
        prune_(model, random_plan(model))
        save_model(model, None, tmp_path / "out")
        if arch in RELOADABLE:
            assert not (tmp_path / "out" / "modeling_ffnscope.py").exists()
        again = reloaded(tmp_path / "out", trust_remote_code=arch not in RELOADABLE)
        assert distance(logits(again), logits(model)) == 0
        assert {s.d_ff for s in find_sites(again)} == {s.d_ff for s in find_sites(model)}
        assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())

    def test_different_widths(self, model: Any, random_plan: MakePlan, tmp_path: Path) -> None:
        plan = random_plan(model, 0.51, allocator="global")  # 47 of 96 channels: no two equal halves
        assert len(set(plan.widths.values())) == LAYERS
        with masked(model, plan):
            by_mask = logits(model)
        prune_(model, plan)
        save_model(model, None, tmp_path / "out")
        with pytest.raises(RuntimeError, match="mismatch"):
            reloaded(tmp_path / "out")
        again = reloaded(tmp_path / "out", trust_remote_code=True)
        assert distance(logits(again), logits(model)) == 0
        assert distance(logits(again), by_mask) < EXACT
        assert [s.d_ff for s in find_sites(again)] == list(plan.widths.values())
        again.save_pretrained(tmp_path / "twice")
        assert distance(logits(reloaded(tmp_path / "twice", trust_remote_code=True)), logits(model)) == 0

    def test_padded_to_the_widest(self, arch: str, model: Any, random_plan: MakePlan, tmp_path: Path) -> None:
        plan = random_plan(model, 0.51, allocator="global")
        with masked(model, plan):
            by_mask = logits(model)
        prune_(model, plan, pad_to_widest=True)
        assert {s.d_ff for s in find_sites(model)} == {max(plan.widths.values())}
        save_model(model, None, tmp_path / "out")
        again = reloaded(tmp_path / "out", trust_remote_code=arch not in RELOADABLE)
        assert distance(by_mask, logits(again)) < EXACT

    def test_generation_after_slicing(self, model: Any, random_plan: MakePlan) -> None:
        prune_(model, random_plan(model))
        ids = tokens(1, 4)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
        )
        assert out.shape == (1, 8)
        assert torch.equal(out[0, 4:5], logits(model, ids)[0, -1].argmax(-1, keepdim=True))
