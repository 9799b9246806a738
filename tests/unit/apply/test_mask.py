from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope.apply import edits
from ffnscope.apply.mask import check_plan, masked
from ffnscope.apply.slice import slice_
from ffnscope.errors import LayoutError, ModelError, UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.types import Budget, FFNSite, PruningPlan
from tiny import logits, tiny

MakePlan = Callable[..., PruningPlan]


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: Any, before: dict[str, Tensor]) -> list[str]:
    return [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]


def plan_for(site: FFNSite, kept: list[int]) -> PruningPlan:
    return PruningPlan({site: torch.tensor(kept)}, "random", "local", Budget(0.5))


def test_only_the_coupled_entries_are_zero() -> None:
    model = tiny("llama_bias")
    site, before = find_sites(model)[1], state(model)
    kept = [i for i in range(48) if i not in (3, 40)]
    with masked(model, plan_for(site, kept)) as inside:
        assert inside is model
        mlp = model.model.layers[1].mlp
        for name in ("gate_proj", "up_proj"):
            module = getattr(mlp, name)
            assert not module.weight[[3, 40]].any() and not module.bias[[3, 40]].any()
            assert torch.equal(module.weight[kept], before[f"model.layers.1.mlp.{name}.weight"][kept])
        assert not mlp.down_proj.weight[:, [3, 40]].any()
        assert torch.equal(mlp.down_proj.bias, before["model.layers.1.mlp.down_proj.bias"])
        assert len(changed(model, before)) == 5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(llama: Any, random_plan: MakePlan, mode: Any) -> None:
    before, plan = state(llama), random_plan(llama)
    with mode(), masked(llama, plan):
        assert changed(llama, before)
    assert changed(llama, before) == []
    logits_after = llama(input_ids=torch.tensor([[1, 2]]), use_cache=False).logits
    logits_after.sum().backward()  # the weights are still ordinary ones


def test_the_tables_of_a_mask_also_hold_for_bfloat16(random_plan: MakePlan) -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    plan, dense = random_plan(model, 0.5), logits(model)
    with masked(model, plan):
        by_mask = logits(model)
    by_slice = logits(slice_(model, plan))
    scale = float(dense.float().abs().max())
    assert float((by_mask.float() - by_slice.float()).abs().max()) < 0.03 * scale
    assert float((by_mask.float() - dense.float()).abs().max()) > 0.1 * scale


class TestInterrupts:
    @pytest.mark.parametrize("at", [0, 1, 4])
    def test_while_entering(self, llama: Any, random_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        before, plan, calls = state(llama), random_plan(llama), []
        write = edits._write

        def interrupted(entry: Any, saved: Any) -> None:
            calls.append(entry)
            write(entry, saved)
            if len(calls) > at:
                raise KeyboardInterrupt

        monkeypatch.setattr(edits, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt), masked(llama, plan):
            raise AssertionError("never entered")
        assert len(calls) == at + 1
        assert changed(llama, before) == []

    def test_while_leaving(self, llama: Any, random_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
        before, plan, calls = state(llama), random_plan(llama), []
        copy = torch.Tensor.index_copy_

        def interrupted(*args: Any) -> Any:
            calls.append(args)
            if len(calls) in (2, 3):
                raise KeyboardInterrupt
            return copy(*args)

        with pytest.raises(KeyboardInterrupt), masked(llama, plan):
            monkeypatch.setattr(torch.Tensor, "index_copy_", interrupted)
        assert len(calls) == 6 + 2
        assert changed(llama, before) == []


def test_a_weight_that_two_sites_share(llama: Any, random_plan: MakePlan) -> None:
    plan = random_plan(llama)
    first, second = (layer.mlp for layer in llama.model.layers)
    second.up_proj.weight = first.up_proj.weight
    before = state(llama)
    with masked(llama, plan):
        assert changed(llama, before)
    assert changed(llama, before) == []
    assert second.up_proj.weight is first.up_proj.weight


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"d_ff": 60}, r"made for model.layers.1.mlp with 60 channels of width 32; this model has 48 of width 32"),
            ({"d_model": 16}, r"with 48 channels of width 16; this model has 48 of width 32 there. Use the model that"),
            (
                {"gate": "up_proj", "fused": "gate_up"},
                r"made for model.layers.1.mlp with 96 outputs of up_proj; this model has 48",
            ),
        ],
    )
    def test_other_shapes(self, llama: Any, random_plan: MakePlan, change: dict[str, Any], message: str) -> None:
        before, good = state(llama), random_plan(llama)
        wrong = replace(list(good.kept)[1], **change)
        first = next(iter(good.kept))
        plan = replace(good, kept={first: good.kept[first], wrong: torch.arange(24)})
        for apply in (lambda: masked(llama, plan).__enter__(), lambda: slice_(llama, plan)):
            with pytest.raises(UsageError, match=message):
                apply()
            assert changed(llama, before) == []

    def test_another_architecture(self, llama: Any, random_plan: MakePlan) -> None:
        with pytest.raises(LayoutError, match=r"transformer.h.0.mlp.c_proj is not in this model"):
            check_plan(llama, random_plan(tiny("gpt2")))

    def test_weights_without_values(self, random_plan: MakePlan) -> None:
        plan = random_plan(tiny("llama"))
        model = tiny("llama").to("meta")
        for apply in (lambda: masked(model, plan).__enter__(), lambda: slice_(model, plan)):
            with pytest.raises(ModelError, match=r"model.layers.0.mlp.gate_proj.weight is on the meta device and has"):
                apply()
