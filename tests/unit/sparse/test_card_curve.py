"""Curves around a card: the forms of `compare_forms` under their labels, what is refused, going on from a state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from faults import flip_digit, stop_at
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import ArtifactError, UnknownNameError, UsageError
from ffnscope.sparse import card_curve as module
from ffnscope.sparse.baselines import baseline, selectors_of
from ffnscope.sparse.calibration import Target
from ffnscope.sparse.card import SparsityCard
from ffnscope.sparse.card_curve import CARD, CurveOptions, card_curve, check_densities, lines_of, n_forms
from ffnscope.sparse.card_options import CardTexts
from ffnscope.sparse.evaluation import DENSE, compare_forms, form_row_of
from ffnscope.sparse.fit import fit_card
from ffnscope.sparse.forms import MaskedForm, low_bit_form
from ffnscope.sparse.rivals import LOW_RANK, RIVALS, USUAL, check_rivals
from ffnscope.sparse.rule import SelectionRule
from ffnscope.sparse.traces import Traces
from ffnscope.sparse.tracing import trace
from reference import exact, text
from tiny_moe import tiny_moe

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
    seen: list[tuple[int, int]] = []
    rows = card_curve(model, traces, card, windows, [0.5, 0.25], on_step=lambda *step: seen.append(step))
    done = [one for one, _ in seen]
    assert done == sorted(done) and len({total for _, total in seen}) == 1 and seen[-1][0] == seen[-1][1]
    assert (rows[0].label, rows[-1].label) == (DENSE, CARD) and len(rows) == n_forms([0.5, 0.25])
    lines = lines_of(rows)
    assert list(lines) == ["low_bit, threshold", "oracle top-k", "static mean", "4-bit dense FFN", CARD]
    assert [row.density for row in lines["oracle top-k"]] == pytest.approx([0.25, 0.5])
    held = traces.windows_of(windows, "test")
    assert 0 < len(held) < len(windows)
    own = MaskedForm(CARD, card.selectors(model))
    mean = MaskedForm("static mean", selectors_of(model, traces, baseline("static mean"), 0.5))
    rounded = low_bit_form(model, 4)
    expected = compare_forms(model, [own, mean, rounded], held)
    for found, row in zip((rows[0], rows[-1], rows[-3], rows[-2]), expected, strict=True):
        assert found.flat() == pytest.approx(row.flat())
        assert form_row_of(found.flat()).flat() == found.flat()
    assert rows[0].perplexity.value == pytest.approx(card.loss["test"].dense)


def test_ffns_that_stay_dense_are_in_the_line_of_the_rule(made: Made) -> None:
    model, windows, traces, card = made
    dense = replace(card, sites=tuple(replace(one, parameter=None) for one in card.sites))
    rows = card_curve(model, traces, dense, windows, [0.25])
    assert [row.label for row in rows] == [DENSE, "low_bit, threshold", *USUAL]
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
    assert len(calls) == 4 and [row.flat() for row in found] == [row.flat() for row in unbroken]
    card_curve(model, traces, card, windows, [0.25, 0.5], options=options)
    assert len(calls) == 7  # the new density only
    other = replace(card, sites=tuple(replace(one, parameter=None) for one in card.sites))
    card_curve(model, traces, other, windows, [0.25], options=options)
    assert len(calls) == 12  # another card: nothing of the state
    flip_digit(tmp_path / "curve.json", '"dense"')
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


class TestRivals:
    def test_every_row_that_needs_no_prompt(self, made: Made) -> None:
        """A density for each point, or one point of its own cost; what reads all of the FFN loses nothing."""
        model, windows, traces, card = made
        against = ("CATS", "sign bits", LOW_RANK, "8-bit dense FFN", "exact zeros (ReLU)", "Deja Vu, logit >= 0")
        options = CurveOptions(batch_size=8, against=against)
        rows = card_curve(model, traces, card, windows, [0.5, 0.25], options=options)
        lines = lines_of(rows)
        assert list(lines) == ["low_bit, threshold", *against, CARD]
        assert [len(lines[label]) for label in against] == [2, 2, 2, 1, 1, 1]
        assert len(rows) == n_forms([0.5, 0.25], against)
        (whole,) = lines["exact zeros (ReLU)"]
        assert whole.density == 1.0  # SiLU has none
        assert whole.difference is not None and whole.difference.value == pytest.approx(0, abs=1e-6)
        assert [row.bytes_share for row in lines[LOW_RANK]] == pytest.approx([0.25, 0.5], abs=0.05)
        (rounded,) = lines["8-bit dense FFN"]
        assert rounded.density is None and 0.5 < rounded.bytes_share < 0.6

    def test_exact_zeros_of_relu(self, tmp_path: Path) -> None:
        """What contributes nothing is left out, at a density of its own and at no loss."""
        model, windows = exact("llama", hidden_act="relu"), text(20, 24)
        traces = trace(model, windows, tmp_path / "t")
        card, _ = fit_card(model, traces, RULE, Target("density", 0.25))
        options = CurveOptions(against=("exact zeros (ReLU)",))
        row = card_curve(model, traces, card, windows, [0.5], options=options)[2]
        assert row.density is not None and 0.2 < row.density < 0.8
        assert row.difference is not None and row.difference.value == pytest.approx(0, abs=1e-6)

    def test_refused(self, made: Made) -> None:
        sites = [one.site for one in made[3].sites]
        with pytest.raises(UnknownNameError, match=r"Unknown row to compare with 'CAT'\. Did you mean 'CATS'"):
            check_rivals(["CAT"])
        with pytest.raises(UsageError, match="GRIFFIN selects by the prompt of a window, and this rule has none"):
            check_rivals(["GRIFFIN"], [], sites)
        with pytest.raises(UsageError, match="are CATS, CATS; give each once"):
            check_rivals(["CATS", "CATS"])
        with pytest.raises(UsageError, match=r"CATS reads the gate, and .* has none"):
            check_rivals(["CATS"], [], [replace(sites[0], gate=None)])
        with pytest.raises(
            UsageError, match=r"core and nucleus cannot go down to a density of 0\.02, only to one above"
        ):
            check_rivals(["4-bit proxy, core and nucleus"], [0.5, 0.02])
        with pytest.raises(
            UsageError, match=r"low-rank FFN cannot go down to a density of 0\.03, only to one above 0\.05"
        ):
            check_rivals([LOW_RANK], [0.03], sites)
        check_rivals(RIVALS, [0.5], sites, prompt=4)

    def test_what_is_known_is_not_made_again(self, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, windows, traces, card = made
        options = CurveOptions(state=tmp_path / "curve.json", against=("CATS", "3-bit dense FFN"))
        first = card_curve(model, traces, card, windows, [0.5], options=options)
        monkeypatch.setattr(module, "rival_forms", lambda *args: 1 / 0)
        again = card_curve(model, traces, card, windows, [0.5], options=options)
        assert [row.flat() for row in again] == [row.flat() for row in first]

    def test_experts_that_no_token_reaches(self, tmp_path: Path) -> None:
        """They count as dense in the bytes."""
        model, windows = tiny_moe("mixtral"), text(6, 6)
        traces = trace(model, windows, tmp_path / "moe")
        card, _ = fit_card(model, traces, SelectionRule("static", "top_k"), Target("density", 0.5))
        form = MaskedForm(CARD, card.selectors(model))
        some = dict.fromkeys(list(form.selectors)[1:], 0.5)
        (first, *others) = card.sites
        assert form.bytes_read(some) == pytest.approx(first.bytes_dense + sum(one.bytes_read for one in others))
