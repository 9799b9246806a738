"""Single blocks on kept hidden states give what the whole model gives; a model that is no such chain is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffnscope.calibrate.blocks import Blocks, open_blocks
from ffnscope.calibrate.forward import forward_logits
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import NotAvailableError, UsageError
from ffnscope.ffn.frozen import frozen
from ffnscope.ffn.sites import find_sites
from offload import KINDS
from reference import padded, text
from tiny import ARCHITECTURES, tiny
from tiny_all import tiny_causal_lm
from tiny_moe import MIXTURES, tiny_moe

MIXES: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {
        "sliding_window": 4,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}


def left_padded(lengths: list[int], width: int = 16) -> Windows:
    right = padded(lengths, width)
    return Windows(right.input_ids.flip(1), right.valid.flip(1), right.targets & False, right.document, right.source)


def last_hidden(model: Any, blocks: Blocks, batch: Windows) -> Tensor:
    """What the last block puts out within a forward of the model."""
    found: list[Any] = []
    handle = blocks.modules[-1].register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        forward_logits(model, batch)
    handle.remove()
    return found[0][0] if isinstance(found[0], tuple) else found[0]


def check_chain(model: Any, batches: list[Windows], tolerance: float = 1e-6) -> Blocks:
    with frozen(model):
        blocks, hidden = open_blocks(model, find_sites(model), batches)
        for i in range(len(blocks.names)):
            with torch.no_grad():
                hidden = [blocks.run(i, b, h) for b, h in enumerate(hidden)]
        for batch, found in zip(batches, hidden, strict=True):
            wanted = last_hidden(model, blocks, batch)
            assert float((found - wanted)[batch.valid].abs().max()) <= tolerance * float(
                wanted[batch.valid].abs().max()
            )
    return blocks


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_chain_of_blocks_is_the_model(arch: str) -> None:
    blocks = check_chain(tiny(arch), list(text(6).batches(4)))
    assert len(blocks.names) == len(blocks.modules) == 2


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts(name: str) -> None:
    check_chain(tiny_moe(name), list(text(6).batches(4)))


@pytest.mark.parametrize("arch", MIXES)
def test_layers_of_two_kinds_have_masks_of_their_own(arch: str) -> None:
    model = tiny(arch, **MIXES[arch])
    blocks = check_chain(model, list(text(6).batches(4)))
    first, second = (call.kwargs["attention_mask"] for call in blocks.calls[0])
    assert first is not second
    assert (first is None) != (second is None) or not torch.equal(first, second)
    plain = check_chain(tiny(arch, sliding_window=64), list(text(6).batches(4)))
    with torch.no_grad():
        h = torch.randn(4, 16, 32)
        i = int(arch == "qwen2")
        assert float((blocks.run(i, 0, h) - plain.run(i, 0, h)).abs().max()) > 1e-3


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom", "gemma3_text", "opt"])
@pytest.mark.parametrize("windows", [padded([16, 5, 9, 12]), left_padded([16, 5, 9, 12])], ids=["right", "left"])
def test_padding(arch: str, windows: Windows) -> None:
    check_chain(tiny(arch), [windows])


def test_short_windows_are_trimmed_like_in_any_pass() -> None:
    batches = list(padded([4, 3, 16, 2]).batches(2))
    assert [b.length for b in batches] == [4, 16]
    check_chain(tiny("llama"), batches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    check_chain(tiny("gemma2", dtype=dtype), [text(2)])


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_weights_come_and_go(kind: str, tmp_path: Path) -> None:
    model = KINDS[kind]("llama", tmp_path)
    empty = {n for n, p in model.named_parameters() if p.device.type == "meta"}
    check_chain(model, list(text(3).batches(2)))
    assert empty
    assert {n for n, p in model.named_parameters() if p.device.type == "meta"} == empty


def test_equal_masks_and_positions_are_held_once(llama: Any) -> None:
    def tensors(windows: Windows) -> list[Tensor]:
        with frozen(llama):
            blocks, _ = open_blocks(llama, find_sites(llama), list(windows.batches(2)))
        values = [v for row in blocks.calls for c in row for v in c.kwargs.values()]
        flat = [part for v in values for part in (v if isinstance(v, tuple) else (v,))]
        return [v for v in flat if isinstance(v, Tensor)]

    found = tensors(text(8))
    assert len(found) == 24  # cosine, sine and position ids of two layers and four batches
    assert len({id(v) for v in found}) == 3
    other = tensors(padded([16, 9, 16, 5, 16, 9]))
    assert len({id(v) for v in other if v.dim() == 4}) == 2  # the masks of the first and the last batch are equal


def test_nothing_is_computed_but_one_piece_of_text_and_nothing_stays(llama: Any) -> None:
    sites = find_sites(llama)
    ran: list[int] = []
    watched = [*(layer.mlp for layer in llama.model.layers), llama.lm_head]
    handles = [m.register_forward_hook(lambda module, args, output: ran.append(output.shape[0])) for m in watched]
    with frozen(llama):
        blocks, hidden = open_blocks(llama, sites, list(text(8).batches(4)))
    assert ran == [2, 2, 2, 2, 2, 2, 2]  # the model once, then each block twice, on two windows
    assert [tuple(h.shape) for h in hidden] == [(4, 16, 32)] * 2
    assert not any(h.requires_grad for h in hidden)
    for module, handle in zip(watched, handles, strict=True):
        handle.remove()
        assert not module._forward_hooks
    for layer in blocks.modules:
        assert "forward" not in vars(layer)
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks


def test_a_block_can_have_a_gradient(llama: Any) -> None:
    with frozen(llama):
        blocks, (hidden,) = open_blocks(llama, find_sites(llama), [text(2)])
        start = hidden.clone().requires_grad_()
        blocks.run(0, 0, start).square().sum().backward()
    assert start.grad is not None
    assert bool(start.grad.any())


class TestRefusals:
    def test_a_block_that_runs_twice(self, llama: Any) -> None:
        sites = find_sites(llama)
        llama.model.layers[1] = llama.model.layers[0]
        with frozen(llama), pytest.raises(NotAvailableError, match="do not run once each and in order"):
            open_blocks(llama, sites[:1], [text(2)])

    def test_something_between_the_blocks(self) -> None:
        """XLM has a list of attentions and one of FFNs, which take turns."""
        model = tiny_causal_lm("xlm")
        with frozen(model), pytest.raises(NotAvailableError, match=r"ffns.1 alone gives other hidden states") as error:
            open_blocks(model, find_sites(model), [text(2)])
        assert "XLMWithLMHeadModel cannot be run block by block" in str(error.value)

    def test_something_that_the_next_block_needs(self) -> None:
        model = tiny_causal_lm("reformer")
        with frozen(model), pytest.raises(NotAvailableError, match="is needed by the next"):
            open_blocks(model, find_sites(model), [text(2)])
        assert not any("forward" in vars(module) for module in model.modules())

    def test_a_block_that_remembers(self, llama: Any) -> None:
        layer = llama.model.layers[0]
        original, count = layer.forward, [0]

        def forward(hidden: Tensor, **kwargs: Any) -> Tensor:
            count[0] += 1
            return original(hidden, **kwargs) * count[0]

        layer.forward = forward
        with frozen(llama), pytest.raises(NotAvailableError, match=r"model.layers.0 alone"):
            open_blocks(llama, find_sites(llama), [text(2)])
        assert vars(layer)["forward"] is forward

    @pytest.mark.parametrize("name", ["hy_v4", "deepseek_v4"])
    def test_more_than_one_stream(self, name: str) -> None:
        model = tiny_causal_lm(name)
        with frozen(model), pytest.raises(NotAvailableError, match=r"works on \(.*4, .*64\) for a batch of \(2, 16\)"):
            open_blocks(model, find_sites(model), [text(2)])

    def test_several_lists(self) -> None:
        model = nn.Module()
        model.a, model.b = nn.ModuleList([nn.Identity()]), nn.ModuleList([nn.Identity()])
        site = find_sites(tiny("llama"))[0]
        both = [replace(site, path="a.0"), replace(site, path="b.0")]
        with pytest.raises(NotAvailableError, match=r"several lists of blocks \(a, b\)"):
            open_blocks(model, both, [text(2)])
        with pytest.raises(NotAvailableError, match="mlp is in no list of blocks"):
            open_blocks(model, [replace(site, path="mlp")], [text(2)])

    def test_no_text(self, llama: Any) -> None:
        with pytest.raises(UsageError, match="at least one window"):
            open_blocks(llama, find_sites(llama), [])
