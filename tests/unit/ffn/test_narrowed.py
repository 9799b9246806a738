from __future__ import annotations

import ast
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from ffnscope.ffn import modeling_ffnscope
from ffnscope.ffn.modeling_ffnscope import KEY, narrow
from ffnscope.ffn.narrowed import MODELING, NARROWED


def test_the_modeling_file_stands_alone() -> None:
    names = [n for n in ast.walk(ast.parse(MODELING.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
    found = {n.module if isinstance(n, ast.ImportFrom) else alias.name for n in names for alias in n.names}
    assert found == {"torch", "transformers", "typing"}
    assert KEY == NARROWED


def test_one_class_per_family() -> None:
    made = modeling_ffnscope.GPT2LMHeadModel
    assert issubclass(made, GPT2LMHeadModel) and made is modeling_ffnscope.GPT2LMHeadModel
    assert made.__module__ == modeling_ffnscope.__name__ and not made.is_custom_code()


@pytest.mark.parametrize("name", ["Nonsense", "AutoConfig", "pipeline"])
def test_what_is_no_model(name: str) -> None:
    with pytest.raises(AttributeError, match=f"has no attribute {name!r}"):
        getattr(modeling_ffnscope, name)


class Pair(nn.Module):
    """Two layers that share a weight, a buffer, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(4, 6)
        self.second.weight = self.first.weight
        self.first.weight.requires_grad_(False)
        self.register_buffer("scale", torch.arange(6.0))
        self.width = 6


def test_narrow() -> None:
    model: Any = Pair()
    before = model.first.weight.clone()
    shapes = {
        f"{layer}.{name}": [3, 4][: 2 if name == "weight" else 1]
        for layer in ("first", "second")
        for name in ("weight", "bias")
    }
    narrow(model, {**shapes, "scale": [3], "width": 3, "first.out_features": 3})
    assert model.first.weight is model.second.weight and not model.first.weight.requires_grad
    assert torch.equal(model.first.weight, before[:3])
    assert model.first.bias is not model.second.bias and model.second.bias.requires_grad
    assert model.scale.tolist() == [0, 1, 2] and "scale" in model.state_dict()
    assert (model.width, model.first.out_features, model.second.out_features) == (3, 3, 6)
    assert model.second(torch.zeros(1, 4)).shape == (1, 3)
