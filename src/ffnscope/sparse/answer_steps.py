"""The steps of `ffnscope.sparse.answer`: calibrate every rule, measure it on every domain, put rows together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ffnscope.calibrate.windows import Windows
from ffnscope.evaluate.intervals import Estimate, over_documents
from ffnscope.ffn.heap import give_back_free
from ffnscope.registry import POLICIES
from ffnscope.sparse.answer_rows import RULES, AnswerOptions, Calibration, Domain, EqualDensity, OnStep, Reuse
from ffnscope.sparse.calibration import Chunks, Scored, Target, calibrate_policy, scored
from ffnscope.sparse.evaluation import Losses, form_losses, mean_density
from ffnscope.sparse.ffn import ffn_of
from ffnscope.sparse.forms import MaskedForm
from ffnscope.sparse.measures import MEASURES, of_mask, summarise, truths
from ffnscope.sparse.policies import Policy
from ffnscope.sparse.predictors.interface import FitTokens, Predictor
from ffnscope.sparse.rule import SelectionRule
from ffnscope.sparse.selector import Selector
from ffnscope.sparse.site_params import site_params
from ffnscope.types import FFNSite

EQUAL = "equal density"
"""Stands where otherwise the domain does that a parameter was calibrated on."""
HELD = 2**26
"""Scores of calibrating tokens that are held in memory; with what else is known of them about 13 bytes each."""
Key = tuple[str, str]
"""Domain that a parameter was calibrated on, or `EQUAL`, and the rule."""


@dataclass(frozen=True, slots=True, eq=False)
class Rules:
    """Predictors and calibrated parameters.

    Attributes:
        predictors: site -> predictor.
        policies: rule -> policy.
        calibrated: (domain, site, rule) -> parameter for the target.
        equal: (domain, site, rule) -> parameter for the density of top-k.
    """

    predictors: Mapping[FFNSite, Predictor]
    policies: Mapping[str, Policy]
    calibrated: Mapping[tuple[str, FFNSite, str], float]
    equal: Mapping[tuple[str, FFNSite, str], float]

    def parameters(self, used_on: str, site: FFNSite, domains: Sequence[str]) -> Iterator[tuple[Key, float]]:
        """All that is measured on a domain: parameters of every domain, and those at equal density."""
        for rule in RULES:
            yield from (((domain, rule), self.calibrated[domain, site, rule]) for domain in domains)
            yield (EQUAL, rule), self.equal[used_on, site, rule]

    def selectors(self, domain: str, rule: str) -> dict[FFNSite, Selector]:
        """Selectors of a rule at equal density."""
        policy = self.policies[rule]
        return {s: Selector(p, policy, self.equal[domain, s, rule]) for s, p in self.predictors.items()}


@dataclass(slots=True, eq=False)
class Measured:
    """What was measured on held-out documents.

    Attributes:
        calibrations: per FFN, own domain.
        values: (domain used on, key, measure) -> per token and FFN, in parts.
        documents: domain -> document of each token and FFN, in parts.
    """

    calibrations: list[Calibration] = field(default_factory=list[Calibration])
    values: dict[tuple[str, Key, str], list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    documents: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def estimate(self, domain: str, key: Key, measure: str, less: Key | None = None) -> Estimate:
        """Mean over tokens and FFNs; less that of another key, token by token."""
        value = torch.cat(self.values[domain, key, measure])
        if less is not None:
            value = value - torch.cat(self.values[domain, less, measure])
        return over_documents(value, torch.cat(self.documents[domain]))


def calibrate_rules(
    model: nn.Module,
    domains: Mapping[str, Domain],
    sites: Sequence[FFNSite],
    options: AnswerOptions,
    on_step: OnStep | None,
) -> Rules:
    """Fit a predictor per FFN on the fitting documents of all domains, and calibrate every rule."""
    policies: dict[str, Policy] = {rule: POLICIES.get(rule).make() for rule in RULES}
    by, predictors = SelectionRule(options.predictor, RULES[0], options.params), dict[FFNSite, Predictor]()
    params = site_params(by, model, sites)
    calibrated: dict[tuple[str, FFNSite, str], float] = {}
    equal: dict[tuple[str, FFNSite, str], float] = {}
    for done, site in enumerate(sites, 1):
        ffn = ffn_of(model, site, next(iter(domains.values())).traces.activation(site))
        predictors[site] = by.own(ahead=False, params=params[site]).make_predictor(ffn, _pooled(domains, site))
        for name, domain in domains.items():
            chunks = _held(scored(predictors[site], ffn, domain.traces.x(site, "calibrate"), options.label))
            for rule, policy in policies.items():
                parameter = calibrate_policy(policy, chunks, options.target).parameter
                calibrated[name, site, rule] = parameter
            k = calibrated[name, site, "top_k"]
            target = Target("density", min(k / site.d_ff, 1.0))
            for rule, policy in policies.items():
                found = k if rule == "top_k" else calibrate_policy(policy, chunks, target).parameter
                equal[name, site, rule] = found
        give_back_free()
        if on_step is not None:
            on_step("calibrating", done, len(sites))
    return Rules(predictors, policies, calibrated, equal)


@torch.no_grad()
def measure_rules(
    domains: Mapping[str, Domain], rules: Rules, options: AnswerOptions, on_step: OnStep | None
) -> Measured:
    """Measure all parameters on the test documents of all domains; scores are made once per token and FFN."""
    found = Measured()
    for done, (site, predictor) in enumerate(rules.predictors.items(), 1):
        for name, domain in domains.items():
            x = domain.traces.x(site, "test")
            if not len(x):
                continue
            document = domain.traces.document[domain.traces.tokens(site, "test")]
            parameters = dict(rules.parameters(name, site, list(domains)))
            _measure_site(found, name, predictor, x, parameters, rules, options)
            found.documents[name].append(document)
            for rule in RULES:
                key = (name, rule)
                reached = over_documents(found.values[name, key, options.target.measure][-1], document)
                density = summarise(found.values[name, key, "density"][-1])
                parameter = rules.calibrated[name, site, rule]
                found.calibrations.append(Calibration(name, site.name, site.layer, rule, parameter, reached, density))
        give_back_free()
        if on_step is not None:
            on_step("measuring", done, len(rules.predictors))
    return found


def equal_rows(
    model: nn.Module,
    domains: Mapping[str, Domain],
    rules: Rules,
    measured: Measured,
    options: AnswerOptions,
    on_step: OnStep | None,
) -> tuple[EqualDensity, ...]:
    """Compare the rules at the density of top-k, in every domain that has test tokens."""
    found: list[EqualDensity] = []
    for done, (name, domain) in enumerate(domains.items(), 1):
        losses = _losses(model, name, domain, rules, options)
        for rule in RULES:
            key, first = (EQUAL, rule), (EQUAL, RULES[0])
            measures = {m: measured.estimate(name, key, m) for m in MEASURES}
            against = {} if key == first else {m: measured.estimate(name, key, m, first) for m in MEASURES}
            row = EqualDensity(name, rule, measures, against)
            found.append(_with_losses(row, losses, domain.windows))
        if on_step is not None:
            on_step("perplexity", done, len(domains))
    return tuple(found)


def reuse_rows(names: Sequence[str], measured: Measured, options: AnswerOptions) -> tuple[Reuse, ...]:
    """What parameters of each domain reach on each other one."""
    found: list[Reuse] = []
    target = options.target.measure
    for calibrated_on in names:
        for used_on in names:
            if used_on == calibrated_on:
                continue
            for rule in RULES:
                key, own = (calibrated_on, rule), (used_on, rule)
                reached = measured.estimate(used_on, key, target)
                difference = measured.estimate(used_on, key, target, own)
                density = measured.estimate(used_on, key, "density").value
                rise = density - measured.estimate(used_on, own, "density").value
                found.append(Reuse(calibrated_on, used_on, rule, reached, difference, density, rise))
    return tuple(found)


def _measure_site(
    found: Measured,
    domain: str,
    predictor: Predictor,
    x: Tensor,
    parameters: Mapping[Key, float],
    rules: Rules,
    options: AnswerOptions,
) -> None:
    """Measure all parameters on tokens of one FFN; what is costly only at equal density."""
    few = tuple(dict.fromkeys(("density", options.target.measure)))
    parts: dict[tuple[Key, str], list[Tensor]] = defaultdict(list)
    for tokens, truth in truths(predictor.ffn, x, options.label):
        scores = predictor(tokens)
        for key, parameter in parameters.items():
            mask = rules.policies[key[1]].select(scores, parameter)
            for name, value in of_mask(mask, truth, MEASURES if key[0] == EQUAL else few).items():
                parts[key, name].append(value)
    for (key, name), values in parts.items():
        found.values[domain, key, name].append(torch.cat(values))


def _held(chunks: Chunks) -> Chunks:
    """The same chunks, kept in memory as long as they are few: every policy passes over them twice or more."""
    kept: list[Scored] = []
    for one in chunks():
        kept.append(one)
        if len(kept) * one.scores.numel() > HELD:
            return chunks
    return lambda: kept


def _pooled(domains: Mapping[str, Domain], site: FFNSite) -> FitTokens:
    """Fitting tokens of all domains; documents of different domains have different numbers."""
    parts = [domain.traces.fit_tokens(site) for domain in domains.values()]
    documents: list[Tensor] = []
    first = 0
    for part in parts:
        assert part.document is not None
        documents.append(part.document + first)
        first += int(part.document.max()) + 1
    return FitTokens(torch.cat([part.x for part in parts]), torch.cat(documents))


def _losses(
    model: nn.Module, name: str, domain: Domain, rules: Rules, options: AnswerOptions
) -> dict[str | None, Losses]:
    """Rule -> losses at equal density; None -> of the dense model; empty without windows."""
    if domain.windows is None:
        return {}
    size = options.batch_size
    found: dict[str | None, Losses] = {None: form_losses(model, None, domain.windows, batch_size=size)}
    for rule in RULES:
        form = MaskedForm(rule, rules.selectors(name, rule))
        found[rule] = form_losses(model, form, domain.windows, batch_size=size)
    return found


def _with_losses(row: EqualDensity, losses: Mapping[str | None, Losses], windows: Windows | None) -> EqualDensity:
    """Add what a rule does to the perplexity, with the paired difference to the first rule."""
    if windows is None or not losses:
        return row
    counts, nll = windows.targets.sum(1), losses[row.rule].nll
    perplexity, dense = (math.exp(float(one.sum() / counts.sum())) for one in (nll, losses[None].nll))
    first = row.rule == RULES[0]
    loss = None if first else over_documents(nll - losses[RULES[0]].nll, windows.document, counts)
    density = mean_density(losses[row.rule].densities)
    return replace(row, perplexity=perplexity, dense_perplexity=dense, loss=loss, text_density=density)
