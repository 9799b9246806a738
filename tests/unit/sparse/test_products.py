"""What a predictor has computed exactly is not read again by the runtime, as the bytes of cards count it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ffnscope.ffn.function import FFN
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites
from ffnscope.registry import PREDICTORS
from ffnscope.sparse.kernels.rows import RowMatrix
from ffnscope.sparse.masking import masked_by
from ffnscope.sparse.policies import TopK
from ffnscope.sparse.predictors.interface import FitTokens
from ffnscope.sparse.products import Products
from ffnscope.sparse.runtime import unwrap_, wrap_
from ffnscope.sparse.selector import Selector
from tiny import tiny, tokens

ACT = {"llama": torch.nn.functional.silu, "opt": torch.relu}
READS = {"exact_gate": ["gate"], "exact_up": ["up"], "oracle": ["gate", "up"]}


def rules(model: Any, arch: str, name: str) -> dict[Any, Selector]:
    found: dict[Any, Selector] = {}
    for site in find_sites(model):
        ffn = FFN(weights_of(model, site), ACT[arch], site.name)
        fit = FitTokens(torch.randn(8, site.d_model, generator=torch.Generator().manual_seed(site.layer)))
        found[site] = Selector(PREDICTORS.get(name).make(ffn, fit), TopK(), site.d_ff // 4)
    return found


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    ("arch", "name"), [*(("llama", name) for name in sorted(READS)), ("opt", "oracle")], ids=lambda value: str(value)
)
@torch.no_grad()
def test_not_read_again(arch: str, name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(arch), tokens(rows, 1)
    chosen = rules(model, arch, name)
    with masked_by(model, chosen):
        expected = model(input_ids=ids).logits
    seen: list[RowMatrix] = []
    dot = RowMatrix.dot
    runtime = wrap_(model, chosen, break_even=1.0)
    monkeypatch.setattr(RowMatrix, "dot", lambda self, *args: seen.append(self) or dot(self, *args))
    monkeypatch.setattr("ffnscope.sparse.kernels.ffn.compiled_kernels", lambda: 1 / 0)  # reads gate and up together
    try:
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    finally:
        unwrap_(model)
    assert all(row.sparse_steps == 1 for row in runtime.measured().values())
    producers = 2 if arch == "llama" else 1
    known = len(READS[name]) if arch == "llama" else 1
    assert len(seen) == len(chosen) * (producers - known)


@pytest.mark.parametrize("name", sorted(READS))
def test_products_are_those_of_the_matrices(name: str) -> None:
    (site, one), *_ = rules(tiny("llama"), "llama", name).items()
    x = torch.randn(3, site.d_model)
    scores, known = one.predictor.score_and_read(x)
    assert torch.equal(scores, one.predictor(x))
    weights = one.predictor.ffn.weights
    for which, weight in (("gate", weights.gate), ("up", weights.up)):
        found = getattr(known, which)
        assert (found is not None) == (which in READS[name]) == (which in one.predictor.reads)
        assert found is None or torch.allclose(found, x @ weight.T, atol=1e-6)


def test_at_takes_channels_and_a_dtype() -> None:
    found = Products(gate=torch.arange(6.0).view(2, 3)).at(torch.tensor([2, 0], dtype=torch.int32), torch.bfloat16)
    assert found.gate is not None and found.gate.tolist() == [[2, 0], [5, 3]] and found.gate.dtype == torch.bfloat16
    assert found and found.up is None and not Products()
