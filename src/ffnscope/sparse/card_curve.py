"""Perplexity against density around a card: its rule, and what stands beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.io import disposable, hash_json, read_state, write_state
from ffnscope.sparse.baselines import site_at_density
from ffnscope.sparse.card import SparsityCard
from ffnscope.sparse.evaluation import DENSE, FormRow, Losses, form_losses, form_row, form_row_of
from ffnscope.sparse.ffn import ffn_of
from ffnscope.sparse.forms import Form, MaskedForm
from ffnscope.sparse.policies import Policy
from ffnscope.sparse.predictors.interface import Predictor
from ffnscope.sparse.rivals import USUAL, check_rivals, points_of, rival_forms
from ffnscope.sparse.rule import SelectionRule
from ffnscope.sparse.selector import Selector
from ffnscope.sparse.traces import Traces
from ffnscope.types import FFNSite

CARD = "the card"

OnStep = Callable[[int, int], None]
"""Called with steps done and in all: batches; making what is measured counts as much as measuring it."""
Rules = Mapping[FFNSite, tuple[Predictor, Policy]]


@dataclass(frozen=True, slots=True)
class CurveOptions:
    """How a curve is measured.

    Attributes:
        batch_size: windows per forward.
        state: file of what was measured: a call that was cut off goes on from it.
        against: labels of `ffnscope.sparse.rivals.RIVALS`, the rows beside the rule of the card.
    """

    batch_size: int = 4
    state: Path | None = None
    against: tuple[str, ...] = USUAL


def check_densities(rule: SelectionRule, densities: Sequence[float]) -> None:
    """Raise UsageError for a density that is none, is there twice, or that the policy cannot go down to."""
    for density in densities:
        if not 0 < density < 1:
            raise UsageError(f"a density of a curve must be in (0, 1), the share of kept channels; got {density:g}.")
        if rule.policy == "hybrid" and density <= rule.core_share:
            raise UsageError(
                f"hybrid always keeps {rule.core_share:g} of the channels, so its curve cannot reach density "
                f"{density:g}. Give higher densities, or a smaller core."
            )
    if len(set(densities)) < len(densities):
        raise UsageError(f"the densities of a curve are {', '.join(map(str, densities))}; give each once.")


def n_forms(densities: Sequence[float], against: Sequence[str] = USUAL) -> int:
    """Models that a curve measures, with the dense one and that of the card."""
    return 2 + len(densities) + sum(len(points_of(label, densities)) for label in against)


def card_curve(
    model: nn.Module,
    traces: Traces,
    card: SparsityCard,
    windows: Windows,
    densities: Sequence[float],
    *,
    options: CurveOptions | None = None,
    on_step: OnStep | None = None,
) -> list[FormRow]:
    """Measure perplexity at several densities, the same in every FFN: by the rule of a card and by others.

    Selections are those of `compare_forms`, prompts included. The rule is calibrated to each density on the calibration
    documents and has no dense FFNs, whereas `CARD` is the card as it is. All are measured on the test documents.

    Args:
        model: the traced model; left as it was.
        traces: of the text that the card was made from.
        card: gives rule, predictors and FFNs.
        windows: that were traced.
        densities: mean shares of kept channels, in (0, 1).
        options: batch size, file to go on from.
        on_step: see `OnStep`.

    Returns:
        The dense model, a row per line and density, labelled by line, and the card unless all its FFNs are dense.

    Raises:
        UsageError: impossible densities or rows, or other windows than were traced.
        ArtifactError: another model.
    """
    options = options or CurveOptions()
    check_densities(card.rule, densities)
    check_rivals(options.against, densities, [one.site for one in card.sites], card.rule.prompt)
    if windows.hash != traces.facts["windows_hash"]:
        raise UsageError(f"the windows of {windows.source} are not those that were traced; give these.")
    key = hash_json([traces.facts["key"], traces.facts["seed"], traces.facts["weights_hash"], _card_key(card)])
    measuring = _Measuring(model, traces.windows_of(windows, "test"), card.rule.prompt, options, key, on_step)
    lines = _lines(model, traces, card, sorted(densities), options.against)
    measuring.forms = sum(len(one.names) for one in lines)
    for line in lines:
        measuring.line(line)
    return [form_row_of(measuring.known[name]) for line in lines for name in line.names]


@dataclass(frozen=True, slots=True, eq=False)
class _Line:
    """Names of points, and what makes their forms in that order, one in memory at a time."""

    names: Sequence[str]
    make: Callable[[], Iterable[Form | None]]


@dataclass(slots=True, eq=False)
class _Measuring:
    """One call of `card_curve`: what is known is not measured again, nor made."""

    model: nn.Module
    held: Windows
    prompt: int
    options: CurveOptions
    key: str
    on_step: OnStep | None
    forms: int = 0
    done: int = 0
    known: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    dense: Losses | None = None

    def __post_init__(self) -> None:
        found = _read(self.options.state, self.key)
        if found:
            self.known, self.dense = found["rows"], Losses(torch.tensor(found["dense"], dtype=torch.float64), {})

    def line(self, line: _Line) -> None:
        """Measure the points of a line that are not known."""
        todo = [name for name in line.names if name not in self.known]
        for name, form in zip(line.names, line.make() if todo else (), strict=bool(todo)):
            self.say(0.5)
            if name not in self.known:
                self.point(name, form)
            self.done += 1
            self.say(0.0)
        self.done += 0 if todo else len(line.names)
        self.say(0.0)

    def point(self, name: str, form: Form | None) -> None:
        """Measure one, and write it down."""
        options = self.options
        losses = form_losses(
            self.model, form, self.held, prompt=self.prompt, batch_size=options.batch_size, on_batch=self._batch
        )
        self.dense = losses if form is None else self.dense
        assert self.dense is not None, "the dense model is the first point"
        self.known[name] = form_row(self.model, form, losses, self.dense, self.held, self.prompt).flat()
        if options.state is not None:
            state = {"key": self.key, "rows": self.known, "dense": self.dense.nll.double().tolist()}
            write_state(options.state, state)

    def say(self, part: float) -> None:
        """Tell how much is done, with a part of the form that runs."""
        each = 2 * math.ceil(len(self.held) / self.options.batch_size)
        if self.on_step is not None:
            self.on_step(round((self.done + part) * each), self.forms * each)

    def _batch(self, done: int, total: int) -> None:
        self.say(0.5 + 0.5 * done / total)


def lines_of(rows: Sequence[FormRow]) -> dict[str, list[FormRow]]:
    """Rows by label, without the dense model, for `draw_quality`."""
    found: dict[str, list[FormRow]] = {}
    for row in rows:
        if row.label != DENSE:
            found.setdefault(row.label, []).append(row)
    return found


def rule_line(rule: SelectionRule) -> str:
    """Label of the line of a rule."""
    return f"{rule.predictor}, {rule.policy}"


def _lines(
    model: nn.Module, traces: Traces, card: SparsityCard, densities: Sequence[float], against: Sequence[str]
) -> list[_Line]:
    """What is measured, the dense model first and the card last."""
    selectors, sites = card.selectors(model), [one.site for one in card.sites]
    own = [f"{rule_line(card.rule)} {density:g}" for density in densities]
    found = [_Line([DENSE], lambda: [None]), _Line(own, partial(_own, model, traces, card, selectors, densities))]
    for label in against:
        make = partial(rival_forms, model, traces, sites, label, densities)
        found.append(_Line(points_of(label, densities), make))
    if selectors:
        found.append(_Line([CARD], lambda: [MaskedForm(CARD, selectors)]))
    return found


def _own(
    model: nn.Module,
    traces: Traces,
    card: SparsityCard,
    selectors: Mapping[FFNSite, Selector],
    densities: Sequence[float],
) -> Iterator[Form]:
    """The rule of a card at every density."""
    rules, label = _rules(model, traces, card, selectors), rule_line(card.rule)
    for density in densities:
        own = {site: site_at_density(traces, site, *rule, density) for site, rule in rules.items()}
        yield MaskedForm(label, own)


def _rules(model: nn.Module, traces: Traces, card: SparsityCard, selectors: Mapping[FFNSite, Selector]) -> Rules:
    """Predictor and policy of every FFN of the card: its own, and new ones where it stays dense."""
    found: dict[FFNSite, tuple[Predictor, Policy]] = {}
    for one in card.sites:
        if one.site in selectors:
            found[one.site] = selectors[one.site].predictor, selectors[one.site].policy
            continue
        known = card.restored(model, one)
        if known is None:
            fit = traces.fit_tokens(one.site, lookahead=0 if one.source is None else 1)
            rule = card.rule.own(ahead=one.source is not None)
            predictor = rule.make_predictor(ffn_of(model, one.site, one.activation), fit)
            known = predictor, rule.make_policy(predictor, fit)
        found[one.site] = known
    return found


def _card_key(card: SparsityCard) -> list[Any]:
    """What a state belongs to, beside the traces."""
    rule = card.rule
    parameters = [(one.site.name, one.parameter) for one in card.sites]
    return [*rule.identity(), parameters]


def _read(state: Path | None, key: str) -> dict[str, Any]:
    if state is not None and state.exists():
        with disposable("the curve is measured again"):
            found = read_state(state)
            if found.get("key") == key:
                return found
    return {}
