from __future__ import annotations

from typing import Any

import pytest
import torch

from ffnscope.apply.mask import masked
from ffnscope.apply.replace import replaced
from ffnscope.calibrate.taps import channel_taps
from ffnscope.errors import UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.types import Budget, PruningPlan
from tiny import tiny, tokens
from tiny_listed import tiny_listed
from tiny_moe import tiny_moe

REMOVED = torch.tensor([0, 3, 7])
MODELS = {name: lambda name=name: tiny(name).double() for name in ("llama", "gpt2", "opt", "phi3")} | {
    **{name: lambda name=name: tiny_moe(name, dtype=torch.float64) for name in ("mixtral", "gpt_oss")},
    "experts in lists": lambda: tiny_listed().double(),
}


def plan_without(sites: list[Any]) -> PruningPlan:
    kept = torch.ones(max(s.d_ff for s in sites), dtype=torch.bool)
    kept[REMOVED] = False
    return PruningPlan({s: kept[: s.d_ff].nonzero().flatten() for s in sites}, "test", "local", Budget(0.1))


@pytest.mark.parametrize("name", MODELS)
def test_zeros_are_the_mask(name: str) -> None:
    model = MODELS[name]()
    sites, ids = find_sites(model), tokens()
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        with masked(model, plan_without(sites)):
            expected = model(input_ids=ids).logits
        with replaced(model, dict.fromkeys(sites, (REMOVED, torch.zeros(3, dtype=torch.float64)))):
            found = model(input_ids=ids).logits
        assert torch.allclose(found, expected, atol=1e-10) and not torch.allclose(found, dense, atol=1e-4)
        assert torch.equal(model(input_ids=ids).logits, dense)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_down_projection_reads_the_constant(name: str) -> None:
    model = MODELS[name]()
    sites = find_sites(model)
    values = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    read: dict[Any, list[torch.Tensor]] = {}
    note = lambda site, h: read.setdefault(site, []).append(h.reshape(-1, h.shape[-1]))  # noqa: E731
    with torch.no_grad(), replaced(model, dict.fromkeys(sites, (REMOVED, values))):
        if name == "llama":
            with channel_taps(model, sites, note):
                model(input_ids=tokens())
            rows = torch.cat(read[sites[0]])
            assert torch.equal(rows[:, REMOVED], values.expand(len(rows), 3))
        changed = model(input_ids=tokens()).logits
    with torch.no_grad(), masked(model, plan_without(sites)):
        assert not torch.allclose(changed, model(input_ids=tokens()).logits, atol=1e-4)


def test_nothing_is_left_after_an_exception() -> None:
    model = tiny("llama")
    site = find_sites(model)[0]
    with torch.no_grad():
        dense = model(input_ids=tokens()).logits
        with pytest.raises(KeyboardInterrupt), replaced(model, {site: (REMOVED, torch.ones(3))}):
            raise KeyboardInterrupt
        assert torch.equal(model(input_ids=tokens()).logits, dense)


@pytest.mark.parametrize(
    ("index", "values", "message"),
    [
        (REMOVED, torch.zeros(2), r"int64 channels \[k\] and as many values; got torch.int64 \(3,\) and \(2,\)"),
        (REMOVED.int(), torch.zeros(3), "got torch.int32"),
        (torch.tensor([0, 10_000]), torch.zeros(2), "must be in .* got 0 to 10000"),
    ],
)
def test_constants_that_do_not_fit(index: torch.Tensor, values: torch.Tensor, message: str) -> None:
    model = tiny("llama")
    with pytest.raises(UsageError, match=message), replaced(model, {find_sites(model)[0]: (index, values)}):
        pass
