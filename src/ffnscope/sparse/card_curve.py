"""Perplexity against density around a card: its rule, the oracle and a constant selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.io import disposable, hash_json, read_state, write_state
from ffnscope.registry import POLICIES
from ffnscope.sparse.baselines import baseline, fit_predictors, site_at_density
from ffnscope.sparse.card import SparsityCard
from ffnscope.sparse.evaluation import DENSE, FormRow, Losses, form_losses, form_row
from ffnscope.sparse.ffn import ffn_of
from ffnscope.sparse.forms import MaskedForm
from ffnscope.sparse.policies import Policy
from ffnscope.sparse.predictors.interface import Predictor
from ffnscope.sparse.rule import SelectionRule
from ffnscope.sparse.selector import Selector
from ffnscope.sparse.traces import Traces
from ffnscope.types import FFNSite

CARD = "the card"
REFERENCES = ("oracle top-k", "static mean")
"""Rows of `BASELINES` beside the rule of the card: the best order there is, and one that does not see the token."""

OnStep = Callable[[str, int, int], None]
"""Called with "fit" after each calibrated selection of all FFNs, or "measure" after each batch: done, and in all."""
Rules = Mapping[FFNSite, tuple[Predictor, Policy]]


@dataclass(frozen=True, slots=True)
class CurveOptions:
    """How a curve is measured.

    Attributes:
        batch_size: windows per forward.
        state: file of what was measured: a call that was cut off goes on from it.
    """

    batch_size: int = 4
    state: Path | None = None


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


def n_forms(densities: Sequence[float]) -> int:
    """Models that a curve measures, with the dense one and that of the card."""
    return 2 + len(densities) * (1 + len(REFERENCES))


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
    """Measure perplexity at several densities, the same in every FFN: by the rule of a card and by `REFERENCES`.

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
        UsageError: impossible densities, or other windows than were traced.
        ArtifactError: another model.
    """
    options, say = options or CurveOptions(), on_step or _silent
    check_densities(card.rule, densities)
    if windows.hash != traces.facts["windows_hash"]:
        raise UsageError(f"the windows of {windows.source} are not those that were traced; give these.")
    held = traces.windows_of(windows, "test")
    forms = _forms(model, traces, card, densities, say)
    key = hash_json([traces.facts["key"], traces.facts["seed"], traces.facts["weights_hash"], _card_key(card)])
    known, found = _read(options.state, key), dict[str, Losses]()
    each, prompt = math.ceil(len(held) / options.batch_size), card.rule.prompt
    for index, (name, form) in enumerate(forms.items()):

        def step(done: int, _: int, before: int = index * each) -> None:
            say("measure", before + done, each * len(forms))

        if name not in known:
            run = partial(form_losses, model, form, held, prompt=prompt, batch_size=options.batch_size, on_batch=step)
            known[name] = _plain(run())
            if options.state is not None:
                write_state(options.state, {"key": key, "losses": known})
        found[name] = _losses(known[name], [] if form is None else form.sites)
        step(each, each)
    return [form_row(model, form, found[name], found[DENSE], held, prompt) for name, form in forms.items()]


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


def _silent(stage: str, done: int, total: int) -> None:
    return None


def _forms(
    model: nn.Module, traces: Traces, card: SparsityCard, densities: Sequence[float], say: OnStep
) -> dict[str, MaskedForm | None]:
    """Name -> what is measured, the dense model first."""
    selectors = card.selectors(model)
    found: dict[str, MaskedForm | None] = {DENSE: None}
    lines = {rule_line(card.rule): partial(_own, model, traces, card, selectors)}
    lines |= {name: partial(_reference, model, traces, card, name) for name in REFERENCES}
    total = len(lines) * len(densities)
    for label, make in lines.items():
        rules = make()
        for density in sorted(densities):
            own = {site: site_at_density(traces, site, *rule, density) for site, rule in rules.items()}
            found[f"{label} {density:g}"] = MaskedForm(label, own)
            say("fit", len(found) - 1, total)
    if selectors:
        found[CARD] = MaskedForm(CARD, selectors)
    return found


def _own(model: nn.Module, traces: Traces, card: SparsityCard, selectors: Mapping[FFNSite, Selector]) -> Rules:
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


def _reference(model: nn.Module, traces: Traces, card: SparsityCard, name: str) -> Rules:
    row = baseline(name)
    policy: Policy = POLICIES.get(row.policy).make()
    made = fit_predictors(model, traces, row, sites=[one.site for one in card.sites])
    return {site: (predictor, policy) for site, predictor in made.items()}


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
                return found["losses"]
    return {}


def _plain(losses: Losses) -> dict[str, Any]:
    densities = {site.name: value for site, value in losses.densities.items()}
    return {"nll": losses.nll.double().tolist(), "densities": densities}


def _losses(value: Mapping[str, Any], sites: Any) -> Losses:
    named = {site.name: site for site in sites}
    densities = {named[name]: one for name, one in value["densities"].items()}
    return Losses(torch.tensor(value["nll"], dtype=torch.float64), densities)
