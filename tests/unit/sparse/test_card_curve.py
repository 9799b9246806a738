"""Curves around a card: the forms of `compare_forms` under their labels, what is refused, going on from a state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from faults import flip_digit, stop_at
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import ArtifactError, UsageError
from ffnscope.sparse import card_curve as module
from ffnscope.sparse.baselines import baseline, selectors_of
from ffnscope.sparse.calibration import Target
from ffnscope.sparse.card import SparsityCard
from ffnscope.sparse.card_curve import CARD, CurveOptions, card_curve, check_densities, lines_of, n_forms
from ffnscope.sparse.card_options import CardTexts
from ffnscope.sparse.evaluation import DENSE, compare_forms, form_row_of
from ffnscope.sparse.fit import fit_card
from ffnscope.sparse.forms import MaskedForm
from ffnscope.sparse.rule import SelectionRule
from ffnscope.sparse.traces import Traces
from ffnscope.sparse.tracing import trace
from reference import exact, text

RULE = SelectionRule("low_bit", "threshold", {"bits": 4, "group": 16})
Made = tuple[Any, Windows, Traces, SparsityCard]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    model, windows = exact("llama"), text(20, 24)
    traces = trace(model, windows, tmp_path_factory.mktemp("traces") / "t")
    card, _ = fit_card(model, traces, RULE, Target("density", 0.25), texts=CardTexts(windows))
    return model, windows, traces, card


def test_rows_are_those_of_compare_forms_on_the_test_documents(made: Made) -> None:
    model, windows, traces, card = made
    seen: list[tuple[str, int, int]] = []
    rows = card_curve(model, traces, card, windows, [0.5, 0.25], on_step=lambda *step: seen.append(step))
    assert seen[5] == ("fit", 6, 6) and seen[-1][0] == "measure" and seen[-1][1] == seen[-1][2]
    assert (rows[0].label, rows[-1].label) == (DENSE, CARD) and len(rows) == n_forms([0.5, 0.25])
    lines = lines_of(rows)
    assert list(lines) == ["low_bit, threshold", "oracle top-k", "static mean", CARD]
    assert [row.density for row in lines["oracle top-k"]] == pytest.approx([0.25, 0.5])
    held = traces.windows_of(windows, "test")
    assert 0 < len(held) < len(windows)
    own = MaskedForm(CARD, card.selectors(model))
    mean = MaskedForm("static mean", selectors_of(model, traces, baseline("static mean"), 0.5))
    expected = compare_forms(model, [own, mean], held)
    for found, row in zip((rows[0], rows[-1], rows[-2]), expected, strict=True):
        assert found.flat() == pytest.approx(row.flat())
        assert form_row_of(found.flat()).flat() == found.flat()
    assert rows[0].perplexity.value == pytest.approx(card.loss["test"].dense)


def test_ffns_that_stay_dense_are_in_the_line_of_the_rule(made: Made) -> None:
    model, windows, traces, card = made
    dense = replace(card, sites=tuple(replace(one, parameter=None) for one in card.sites))
    rows = card_curve(model, traces, dense, windows, [0.25])
    assert [row.label for row in rows] == [DENSE, "low_bit, threshold", "oracle top-k", "static mean"]
    whole = card_curve(model, traces, card, windows, [0.25])
    assert rows[1].flat() == whole[1].flat()  # predictors that are made again are the same


def test_it_goes_on(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows, traces, card = made
    options = CurveOptions(state=tmp_path / "curve.json")
    unbroken = card_curve(model, traces, card, windows, [0.25])
    with monkeypatch.context() as patch:
        stop_at(patch, module, "form_losses", 3)
        with pytest.raises(KeyboardInterrupt):
            card_curve(model, traces, card, windows, [0.25], options=options)
    calls = stop_at(monkeypatch, module, "form_losses", 0)
    found = card_curve(model, traces, card, windows, [0.25], options=options)
    assert len(calls) == 3 and [row.flat() for row in found] == [row.flat() for row in unbroken]
    card_curve(model, traces, card, windows, [0.25, 0.5], options=options)
    assert len(calls) == 6  # the new density only
    other = replace(card, sites=tuple(replace(one, parameter=None) for one in card.sites))
    card_curve(model, traces, other, windows, [0.25], options=options)
    assert len(calls) == 10  # another card: nothing of the state
    flip_digit(tmp_path / "curve.json", '"nll"')
    with pytest.raises(ArtifactError, match=r"curve.json is damaged.*Delete it, and the curve is measured again"):
        card_curve(model, traces, other, windows, [0.25], options=options)


@pytest.mark.parametrize(
    ("densities", "rule", "message"),
    [
        ([0.3, 30], RULE, r"must be in \(0, 1\), the share of kept channels; got 30"),
        ([0.3, 0.3], RULE, "give each once"),
        ([0.3], SelectionRule("oracle", "hybrid", {}, {"core": 0.4}), "cannot reach density 0.3"),
    ],
)
def test_refused_densities(densities: list[float], rule: SelectionRule, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_densities(rule, densities)


def test_other_windows_and_models_are_refused(made: Made) -> None:
    model, windows, traces, card = made
    with pytest.raises(UsageError, match="not those that were traced"):
        card_curve(model, traces, card, windows[:5], [0.5])
    with pytest.raises(ArtifactError, match="the card was made for weights"):
        card_curve(exact("llama", seed=1), traces, card, windows, [0.5])
