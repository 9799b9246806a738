import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ffnscope.apply.export import save_model
from ffnscope.apply.mask import masked
from ffnscope.apply.slice import slice_
from ffnscope.errors import LayoutError, UsageError
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.types import Budget, PruningPlan
from tiny import logits
from tiny_moe import DENSE, EXPERT, MIXTURES, tiny_moe

MakePlan = Callable[..., PruningPlan]
CUT = "the tensors are|experts of one layer lie in one tensor"


def plan_of(model: Any, widths: dict[str, int]) -> PruningPlan:
    """Keep the first channels of the sites that are named, all of the others."""
    kept = {s: torch.arange(widths.get(s.name, s.d_ff)) for s in find_sites(model)}
    return PruningPlan(kept, "by hand", "by hand", Budget(0.1))


@pytest.mark.parametrize("name", MIXTURES)
def test_unequal_experts_are_cut_to_the_widest_and_zeroed(name: str, random_plan: MakePlan) -> None:
    model = tiny_moe(name)
    plan = random_plan(model, 0.5, allocator="global")
    with masked(model, plan):
        by_mask = logits(model)
    with pytest.warns(UserWarning, match=CUT):
        sliced = slice_(copy.deepcopy(model), plan)
    assert float((by_mask - logits(sliced)).abs().max()) < 1e-4
    step = 1 if name in ("dbrx", "jetmoe", "llama4_text", "longcat_flash") else 4
    for path in {s.path for s in plan.kept if s.expert is not None and "shared" not in s.path}:
        widest = max(k.numel() for s, k in plan.kept.items() if s.path == path)
        found = {s.d_ff for s in find_sites(sliced) if s.path == path}
        assert found == {min(-(-widest // step) * step, EXPERT)}


def test_the_surplus_is_zero_in_all_weights() -> None:
    model = tiny_moe("gpt_oss")
    layer = "model.layers.0.mlp.experts"
    names = {f"{layer}.{e}": 8 for e in range(4)} | {f"{layer}.2": 4}
    with pytest.warns(UserWarning, match=rf"in 1 layer\(s\) .* 4 removed channels .*\({layer}: width 8, 4 zeroed\)"):
        slice_(model, plan_of(model, names))
    narrow, other = (weights_of(model, s) for s in find_sites(model)[2:4])
    for found, dead in ((narrow, True), (other, False)):
        parts = (found.gate, found.up, found.down.T, found.gate_bias, found.up_bias)
        assert all(bool((p[4:] == 0).all()) == dead for p in parts if p is not None)
        assert all(bool((p[:4] != 0).any()) for p in parts if p is not None)
    assert narrow.down_bias is not None
    assert bool((narrow.down_bias != 0).any())


def test_experts_that_the_plan_leaves_out_keep_all() -> None:
    model = tiny_moe("qwen3_moe")
    one = find_sites(model, ["model.layers.0.mlp.experts.1"])
    plan = PruningPlan({one[0]: torch.arange(8)}, "by hand", "by hand", Budget(0.1))
    with masked(model, plan):
        by_mask = logits(model)
    with pytest.warns(UserWarning, match=r"width 16, 8 zeroed"):
        slice_(model, plan)
    assert float((by_mask - logits(model)).abs().max()) < 1e-4
    assert {s.d_ff for s in find_sites(model)} == {EXPERT}


def test_a_width_that_the_grouped_kernel_cannot_run_is_rounded_up() -> None:
    model = tiny_moe("mixtral")
    assert model.config._experts_implementation == "grouped_mm"
    plan = plan_of(model, {s.name: 6 for s in find_sites(model)})
    with pytest.warns(UserWarning, match=r"rows of 16 bytes; in 2 layer\(s\) .* 16 removed channels are zeroed"):
        slice_(model, plan)
    assert {s.d_ff for s in find_sites(model)} == {8}
    assert torch.isfinite(logits(model)).all()


def test_widths_that_modules_remember_follow() -> None:
    jet, dbrx = tiny_moe("jetmoe"), tiny_moe("dbrx")
    for model in (jet, dbrx):
        slice_(model, plan_of(model, {s.name: 8 for s in find_sites(model)}))
    mlp = jet.model.layers[0].mlp
    assert (mlp.input_linear.output_size, mlp.output_linear.input_size) == (16, 8)
    assert (mlp.input_linear.input_size, mlp.output_linear.output_size) == (32, 32)
    ffn = dbrx.transformer.blocks[0].ffn
    assert ffn.experts.ffn_hidden_size == ffn.experts.mlp.ffn_hidden_size == 8


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mixtral", {"intermediate_size": 8}),
        ("qwen2_moe", {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 20, "intermediate_size": DENSE}),
        ("deepseek_v3", {"moe_intermediate_size": 8, "intermediate_size": 24}),
        ("nemotron_h", {"moe_intermediate_size": 8, "moe_shared_expert_intermediate_size": 20}),
        ("longcat_flash", {"expert_ffn_hidden_size": 8, "ffn_hidden_size": 24}),
    ],
)
def test_the_config_follows(name: str, fields: dict[str, int], random_plan: MakePlan, tmp_path: Path) -> None:
    model = tiny_moe(name)
    slice_(model, random_plan(model, 0.5))
    assert {field: getattr(model.config, field) for field in fields} == fields
    save_model(model, None, tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out").eval()
    assert float((logits(again) - logits(model)).abs().max()) < 1e-5


def test_a_plan_of_another_mixture_is_refused(random_plan: MakePlan) -> None:
    plan = random_plan(tiny_moe("mixtral"), 0.5)
    with pytest.raises(
        UsageError, match=r"was made for model.layers.0.mlp.experts.0 with 16 channels of width 32; this"
    ):
        slice_(tiny_moe("mixtral", intermediate_size=24), plan)
    with pytest.raises(LayoutError, match=r"model.layers.0.mlp.experts.2 \(down_proj\) is not in this model"):
        slice_(tiny_moe("mixtral", num_local_experts=2), plan)
    with pytest.raises(LayoutError, match=r"model.layers.0.mlp.experts.0 \(down_proj\) is not in this model"):
        slice_(tiny_moe("dbrx"), plan)
