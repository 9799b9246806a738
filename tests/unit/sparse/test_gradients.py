"""Gradients by outputs of FFNs against slow autograd, and the damage that they weigh, by hand."""

from __future__ import annotations

import pytest
import torch

from ffnscope.errors import NonFiniteError
from ffnscope.ffn.sites import find_sites
from ffnscope.sparse.gradients import fisher_damage, output_gradients
from reference import exact, padded, slow_signals_of_all
from tiny_moe import tiny_moe


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_they_are_those_of_autograd(arch: str) -> None:
    model, windows = exact(arch), padded([16, 9, 12])
    sites = find_sites(model)
    found = output_gradients(model, sites, windows, batch_size=2)
    expected = slow_signals_of_all(model, sites, windows)
    for site in sites:
        assert torch.allclose(found[site].x, expected[site]["x"].float(), atol=1e-5)
        assert torch.allclose(found[site].dy, expected[site]["dy"].float(), atol=1e-5)
        assert float(found[site].dy.abs().max()) > 0
    assert all(p.requires_grad for p in model.parameters())


def test_experts_have_rows_of_their_own() -> None:
    model, windows = tiny_moe("mixtral"), padded([16, 9])
    found = output_gradients(model, find_sites(model), windows)
    assert found
    assert all(len(one.x) == len(one.dy) > 0 for one in found.values())


def test_damage_by_hand() -> None:
    lost, dy = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[2.0, 1.0], [5.0, 1.0]])
    assert fisher_damage(lost, dy) == pytest.approx(((4 + 4) + 9) / 2)


def test_nan_is_named() -> None:
    model = exact("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match="gradient by the output of"):
        output_gradients(model, find_sites(model), padded([16]))
