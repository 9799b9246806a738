"""Which FFNs a block adds to what it puts out, and by which number they are multiplied there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope.apply.block_output import output_gains
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.sites import find_sites
from reference import padded, text
from tiny import ARCHITECTURES, tiny
from tiny_all import tiny_causal_lm
from tiny_moe import tiny_moe

BEHIND_A_NORM = {"olmo2", "gemma2", "gemma3_text", "opt_projected", "bert"}


def gains_of(model: Any, windows: Any = None) -> list[float | None]:
    """In the order of the dense FFNs."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sites = find_sites(model)
    with frozen(model):
        found = output_gains(model, sites, text(4) if windows is None else windows)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(site.expert is None for site in found)
    return [found.get(site) for site in sites if site.expert is None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_unless_a_norm_is_behind(arch: str, dtype: torch.dtype) -> None:
    assert gains_of(tiny(arch, dtype=dtype)) == [None if arch in BEHIND_A_NORM else 1.0] * 2


def test_a_number_of_the_model() -> None:
    model = tiny_causal_lm("granite")
    for layer in model.model.layers:
        layer.residual_multiplier = 0.22
    assert gains_of(model) == pytest.approx([0.22] * 3, rel=1e-4)


def test_shared_experts_are_added_unless_gated() -> None:
    assert gains_of(tiny_moe("deepseek_v3")) == [1.0, 1.0]
    assert gains_of(tiny_moe("qwen2_moe")) == [None, None]
    assert gains_of(tiny_moe("mixtral")) == []


def test_one_of_two_in_a_block() -> None:
    """The first FFN of a LongCat block is read by the second one."""
    assert gains_of(tiny_moe("longcat_flash"))[:2] == [None, 1.0]


def test_padding_is_not_looked_at() -> None:
    model = tiny("llama")

    def spoil(module: Any, args: Any, output: Tensor) -> Tensor:
        return torch.where(torch.arange(output.shape[1])[None, :, None] >= 5, 3.0, output)

    model.model.layers[0].register_forward_hook(spoil)
    assert gains_of(model, padded([5])) == [1.0, 1.0]


def test_an_ffn_that_puts_out_nothing_is_not_told() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    assert gains_of(model) == [1.0, None]
