"""Looking for FFNs reads next to nothing of a streamed model, and finds the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ffnscope.ffn.projection import is_projection
from ffnscope.ffn.sites import find_sites
from ffnscope.ffn.stream import find_stream
from ffnscope.ffn.survey import survey
from ffnscope.ffn.unread import unread_head, unread_projections
from streams import streamed
from tiny import ARCHITECTURES, tiny
from tiny_moe import MIXTURES, tiny_moe


def read_weights(model: nn.Module) -> list[str]:
    """Names of the offloaded weights that are read from now on, as they are read."""
    found: list[str] = []
    for name, module in model.named_modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in [] if hook is None else getattr(hook, "hooks", (hook,)):
            if getattr(one, "weights_map", None) is not None:
                one.weights_map = _Watched(one.weights_map, name, found)
    return found


class _Watched:
    def __init__(self, before: Any, name: str, found: list[str]):
        self.before, self.name, self.found = before, name, found
        self.dataset, self.prefix = before.dataset, before.prefix

    def __getitem__(self, key: str) -> torch.Tensor:
        self.found.append(f"{self.name}.{key}")
        return self.before[key]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_is_found(name: str) -> None:
    model = tiny(name)
    assert survey(streamed(model)) == survey(model)


@pytest.mark.parametrize("name", sorted(MIXTURES.keys() - {"dbrx", "jetmoe"}))  # which accelerate cannot offload
def test_the_same_is_found_in_mixtures(name: str) -> None:
    model = tiny_moe(name)
    assert survey(streamed(model)) == survey(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt_projected"])
def test_no_projection_is_read(name: str) -> None:
    model = streamed(tiny(name))
    read = read_weights(model)
    sites = find_sites(model)
    find_stream(model, sites)
    matrices = {f"{path}.weight" for path, module in model.named_modules() if is_projection(module)}
    assert read and matrices.isdisjoint(read)


def test_mixtures_are_run_but_their_head_is_not_read() -> None:
    model = streamed(tiny_moe("mixtral"))
    read = read_weights(model)
    find_sites(model)
    assert any("experts" in name for name in read)
    assert "lm_head.weight" not in read


def test_forwards_are_as_before_behind_it() -> None:
    model = streamed(tiny("llama"))
    ids = torch.arange(6)[None]
    wanted = model(input_ids=ids).logits
    with unread_projections(model):
        assert not torch.equal(model(input_ids=ids).logits, wanted)
    with unread_head(model):
        assert not bool(model(input_ids=ids).logits.any())
    assert torch.equal(model(input_ids=ids).logits, wanted)


def test_a_resident_model_runs_as_it_is() -> None:
    model = tiny("llama")
    ids = torch.arange(6)[None]
    wanted = model(input_ids=ids).logits
    with unread_projections(model), unread_head(model):
        assert torch.equal(model(input_ids=ids).logits, wanted)
