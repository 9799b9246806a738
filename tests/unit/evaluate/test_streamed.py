"""A streamed model has the perplexity, and its plans the fidelity, of the resident one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ffnscope
from ffnscope.errors import NonFiniteError
from ffnscope.evaluate.compare import EvalRow, compare_plans
from ffnscope.evaluate.perplexity import perplexity
from ffnscope.ffn.sites import find_sites
from reference import exact, padded, text
from streams import streamed
from tiny import tiny


def test_perplexity_in_float64() -> None:
    model, windows = exact("llama"), padded([16, 5, 16, 9, 12])
    wanted = perplexity(model, windows, batch_size=2)
    told: list[tuple[int, int]] = []
    found = perplexity(streamed(model), windows, batch_size=2, on_batch=lambda *share: told.append(share))
    assert found.value == pytest.approx(wanted.value, rel=1e-12)
    assert found.stderr == pytest.approx(wanted.stderr, rel=1e-9)
    assert (found.protocol, found.n) == (wanted.protocol, wanted.n)
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("arch", ["gemma2", "gpt2", "opt_projected", "phi3", "bert", "gemma"])
def test_perplexity_of_other_heads(arch: str) -> None:
    model = tiny(arch)
    wanted = perplexity(model, text(4), batch_size=2).value
    assert perplexity(streamed(model), text(4), batch_size=2).value == pytest.approx(wanted, rel=1e-5)


def values(rows: list[EvalRow]) -> list[float]:
    return [result.value for row in rows for result in row.results]


def test_comparison_and_its_state(tmp_path: Path) -> None:
    model, windows = exact("llama"), padded([16, 5, 16, 9, 12])
    plans = {str(share): _plan(model, share) for share in (0.25, 0.5)}
    wanted = compare_plans(model, plans, windows, batch_size=2)
    twin = streamed(model)
    state = tmp_path / "state.json"
    found = compare_plans(twin, plans, windows, batch_size=2, state=state)
    assert values(found) == pytest.approx(values(wanted), rel=1e-9)
    ran: list[Any] = []
    handle = twin.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda *_: ran.append(0))
    assert values(compare_plans(twin, plans, windows, batch_size=2, state=state)) == values(found)
    handle.remove()
    assert not ran


def _plan(model: Any, sparsity: float) -> ffnscope.PruningPlan:
    random = torch.Generator().manual_seed(0)
    values = {site: torch.rand(site.d_ff, generator=random, dtype=torch.float64) for site in find_sites(model)}
    return ffnscope.build_plan(ffnscope.Scores("random", values, {}), sparsity)


def test_an_overflow_names_the_window() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[:] = float("inf")
    with pytest.raises(NonFiniteError, match=r"window 0 .*lm_head.weight holds NaN or infinity"):
        perplexity(streamed(model), text(2))
