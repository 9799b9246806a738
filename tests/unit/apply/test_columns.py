"""Down columns that are replaced for a while: what then runs, and that nothing stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ffnscope.apply.columns import columns_replaced
from ffnscope.apply.mask import masked
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.plan.build import build_plan
from ffnscope.scoring import score
from ffnscope.types import FFNSite
from offload import KINDS
from tiny import logits, tiny
from tiny_moe import tiny_moe


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def zeroed(model: Any) -> tuple[Any, dict[FFNSite, Tensor]]:
    """A plan, and the down columns of a resident model with those that it removes set to zero."""
    plan = build_plan(score(model, find_sites(model), "random", seed=0), 0.5)
    return plan, {s: weights_of(model, s).down * plan.mask(s) for s in plan.kept}


@pytest.mark.parametrize("make", ["llama", "gpt2", "mixtral", "gpt_oss", "dbrx", "aria_text"])
def test_zero_columns_are_a_mask(make: str) -> None:
    model = tiny(make) if make in ("llama", "gpt2") else tiny_moe(make)
    plan, columns = zeroed(model)
    before, dense = state(model), logits(model)
    with masked(model, plan):
        wanted = logits(model)
    with columns_replaced(model, columns):
        found = logits(model)
        assert all(torch.equal(weights_of(model, s).down, value) for s, value in columns.items())
    assert float((found - wanted).abs().max()) < 1e-4
    assert float((found - dense).abs().max()) > 1e-2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_all_is_back_after_an_error(llama: Any, error: type[BaseException]) -> None:
    _, columns = zeroed(llama)
    before = state(llama)
    with pytest.raises(error), columns_replaced(llama, columns):
        raise error
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded(kind: str, tmp_path: Path) -> None:
    resident, model = tiny("gpt2"), KINDS[kind]("gpt2", tmp_path)
    _, columns = zeroed(resident)
    dense = logits(model)
    with columns_replaced(resident, columns):
        wanted = logits(resident)
    with columns_replaced(model, columns):
        torch.testing.assert_close(logits(model), wanted)
    assert torch.equal(logits(model), dense)
