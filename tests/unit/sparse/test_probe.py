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
from ffnscope.sparse.probe import FitTime, fit_time, predictor_bytes, probe_fit
from ffnscope.sparse.rule import SelectionRule
from tiny import tiny, tokens
from tiny_moe import tiny_moe


def text(n_documents: int) -> Windows:
    one = contiguous_windows(tokens().repeat(n_documents, 1)[:n_documents], "tokens")
    return Windows(one.input_ids, one.valid, one.targets, torch.arange(n_documents), one.source)


def test_a_line_through_two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 105.0, 200.0, 208.0])
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    model, given = tiny("llama"), text(11)
    each = given.length
    found = fit_time(model, [given], find_sites(model)[:1], lambda traces: (len(traces[0].document), 5))
    assert found.per_token == pytest.approx(3 / (5 * each)) and found.fixed == pytest.approx(2.0)
    assert found.of(10, 1000) == pytest.approx(20 + 600 / each) and found.predictor_bytes == 5


def test_a_text_of_few_documents_is_all_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 106.0, 200.0, 206.0])
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    model, given = tiny("llama"), text(3)
    found = fit_time(model, [given], find_sites(model)[:1], lambda traces: (len(traces[0].document), 5))
    assert found == FitTime(0.0, 6 / given.n_tokens, 5)


@pytest.mark.parametrize("model", [tiny("llama"), tiny_moe("mixtral")], ids=["dense", "experts"])
@pytest.mark.parametrize("rule", [SelectionRule("low_bit", "top_k"), SelectionRule("static", "threshold")])
def test_a_card(model: Any, rule: SelectionRule) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    site = find_sites(model)[0]
    found = probe_fit(model, text(10), find_sites(model), rule, Target("density", 0.5), CardOptions())
    dense = 2 * 4 * site.d_model * site.d_ff  # what the codes of gate and up stand for
    assert found.predictor_bytes > dense if rule.predictor == "low_bit" else found.predictor_bytes < dense
    assert found.fixed >= 0 and found.per_token >= 0 and found.of(1, 1) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bytes_of_a_predictor_are_its_own() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(3, 4)
            self.register_buffer("same", self.one.weight.detach())
            self.made = torch.zeros(5, dtype=torch.float64)

    assert predictor_bytes(Two()) == 4 * (12 + 4) + 8 * 5


def test_too_few_documents() -> None:
    model = tiny("llama")
    with pytest.raises(UsageError, match="at least 3 documents"):
        probe_fit(
            model, text(2), find_sites(model), SelectionRule("low_bit", "top_k"), Target("density", 0.5), CardOptions()
        )
