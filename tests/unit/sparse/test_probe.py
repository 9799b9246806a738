"""The probe of a fit: two sizes give seconds of an FFN and of a token, and nothing is left behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ffnscope.calibrate.windows import Windows, contiguous_windows
from ffnscope.errors import UsageError
from ffnscope.ffn.sites import find_sites
from ffnscope.sparse import probe
from ffnscope.sparse.calibration import Target
from ffnscope.sparse.card_options import CardOptions
from ffnscope.sparse.probe import FitTime, fit_time, probe_fit
from ffnscope.sparse.rule import SelectionRule
from tiny import tiny, tokens
from tiny_moe import tiny_moe


def text(n_documents: int) -> Windows:
    one = contiguous_windows(tokens().repeat(n_documents, 1)[:n_documents], "tokens")
    return Windows(one.input_ids, one.valid, one.targets, torch.arange(n_documents), one.source)


def test_a_line_through_two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 105.0, 200.0, 208.0])
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    model, given = tiny("llama"), text(7)
    each = given.length
    found = fit_time(model, [given], find_sites(model)[:1], lambda traces: len(traces[0].document))
    assert found.per_token == pytest.approx(3 / (3 * each)) and found.fixed == pytest.approx(2.0)
    assert found.of(10, 1000) == pytest.approx(20 + 1000 / each)


def test_a_text_of_few_documents_is_all_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 106.0, 200.0, 206.0])
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    model, given = tiny("llama"), text(3)
    found = fit_time(model, [given], find_sites(model)[:1], lambda traces: len(traces[0].document))
    assert found == FitTime(0.0, 6 / given.n_tokens)


@pytest.mark.parametrize("model", [tiny("llama"), tiny_moe("mixtral")], ids=["dense", "experts"])
@pytest.mark.parametrize("rule", [SelectionRule("low_bit", "top_k"), SelectionRule("static", "threshold")])
def test_a_card(model: Any, rule: SelectionRule) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = probe_fit(model, text(6), find_sites(model), rule, Target("density", 0.5), CardOptions())
    assert found.fixed >= 0 and found.per_token >= 0 and found.of(1, 1) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_too_few_documents() -> None:
    model = tiny("llama")
    with pytest.raises(UsageError, match="at least 3 documents"):
        probe_fit(
            model, text(2), find_sites(model), SelectionRule("low_bit", "top_k"), Target("density", 0.5), CardOptions()
        )
