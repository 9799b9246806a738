"""Rows of a comparison: labelled selectors that every report on contextual sparsity should hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ffnscope.errors import unknown_name
from ffnscope.ffn.function import FFN
from ffnscope.registry import PREDICTORS
from ffnscope.sparse.calibration import Target, calibrate_policy, scored_readings
from ffnscope.sparse.costs import GROUP, low_bit_share, rank_for
from ffnscope.sparse.ffn import ffn_of
from ffnscope.sparse.labels import nonzero
from ffnscope.sparse.policies import Policy, TopK
from ffnscope.sparse.predictors.interface import FitTokens, Predictor
from ffnscope.sparse.readings import readings_of
from ffnscope.sparse.rule import SelectionRule
from ffnscope.sparse.selector import Selector
from ffnscope.sparse.traces import Traces
from ffnscope.types import FFNSite

OnSite = Callable[[int, int], None]
"""Called after each FFN with FFNs done, and FFNs in all."""


def _no_params(ffn: FFN) -> Mapping[str, Any]:
    return {}


def _given(**params: Any) -> Callable[[FFN], Mapping[str, Any]]:
    return lambda ffn: params


def _plain(ffn: FFN, density: float) -> Mapping[str, Any]:
    return {}


def _caps(ffn: FFN, density: float) -> Mapping[str, Any]:
    """From half as many channels to twice as many as the mean."""
    return {"k_min": round(density / 2 * ffn.d_ff), "k_max": min(round(2 * density * ffn.d_ff), ffn.d_ff)}


def _same_bytes(n_matrices: int, **params: Any) -> Callable[[FFN], Mapping[str, Any]]:
    """The rank at which factors are as large as gate and up in 4 bits."""

    def of(ffn: FFN) -> Mapping[str, Any]:
        share = low_bit_share(4) * (2 / 3 if ffn.gated else 1 / 2)
        return {"rank": rank_for(ffn, share, n_matrices if ffn.gated else 1), **params}

    return of


@dataclass(frozen=True, slots=True, eq=False)
class Baseline:
    """A predictor and a policy under the name that a report gives them.

    Attributes:
        label: the name.
        predictor: name in the registry.
        policy: name in the registry.
        params: parameters of the predictor for an FFN.
        policy_params: parameters of the policy for an FFN and a density.
        gated: whether it is for gated FFNs only.
        needs_prompt: whether its selection is that of the prompt of a window, so that it needs one to be fair.
        parameter: of the policy, where the rule comes with one, so that its density is its own; None calibrates.
    """

    label: str
    predictor: str
    policy: str = "top_k"
    params: Callable[[FFN], Mapping[str, Any]] = field(default=_no_params)
    policy_params: Callable[[FFN, float], Mapping[str, Any]] = field(default=_plain)
    gated: bool = False
    needs_prompt: bool = False
    parameter: float | None = None

    def make_policy(self, predictor: Predictor, fit: FitTokens, density: float) -> Policy:
        """The policy for the scores of a predictor, at a density."""
        params = self.policy_params(predictor.ffn, density)
        return SelectionRule(policy=self.policy, policy_params=params).make_policy(predictor, fit)


_ROWS = (
    Baseline("oracle top-k", "oracle"),
    Baseline("oracle |h| top-k, no norm", "oracle", params=_given(norm=False)),
    Baseline("oracle threshold", "oracle", "threshold"),
    Baseline("oracle nucleus", "oracle", "nucleus"),
    Baseline("oracle statistical top-k", "oracle", "statistical_top_k"),
    Baseline("oracle top-k per bank of 64", "oracle", "bank_top_k"),
    Baseline("CATS", "exact_gate", "threshold", _given(up_size=False, norm=False), gated=True),
    Baseline("CHESS", "exact_gate", "threshold", _given(norm=False), gated=True),
    Baseline("exact gate, sized", "exact_gate", params=_no_params, gated=True),
    Baseline("exact up (COUNTDOWN)", "exact_up", "threshold", _given(gate_size=False, norm=False), gated=True),
    Baseline("exact up, sized", "exact_up", params=_no_params, gated=True),
    Baseline("4-bit proxy top-k", "low_bit", params=_given(bits=4, group=GROUP)),
    Baseline("4-bit proxy threshold", "low_bit", "threshold", _given(bits=4, group=GROUP)),
    Baseline("4-bit proxy nucleus", "low_bit", "nucleus", _given(bits=4, group=GROUP)),
    Baseline("4-bit proxy threshold per channel", "low_bit", "channel_threshold", _given(bits=4, group=GROUP)),
    Baseline("4-bit proxy capped threshold", "low_bit", "capped_threshold", _given(bits=4, group=GROUP), _caps),
    Baseline("4-bit proxy, core and nucleus", "low_bit", "hybrid", _given(bits=4, group=GROUP)),
    Baseline("3-bit proxy top-k", "low_bit", params=_given(bits=3, group=GROUP)),
    Baseline("3-bit proxy threshold", "low_bit", "threshold", _given(bits=3, group=GROUP)),
    Baseline("whitened SVD, bytes of the 4-bit proxy", "whitened_svd", params=_same_bytes(2)),
    Baseline("trained low rank, bytes of the 4-bit proxy", "low_rank", params=_same_bytes(1)),
    Baseline("trained low rank without ReLU", "low_rank", params=_same_bytes(1, relu=False)),
    Baseline("trained low rank, one layer ahead", "low_rank", params=_same_bytes(1, lookahead=1)),
    Baseline("Deja Vu", "deja_vu", params=_same_bytes(1)),
    Baseline("Deja Vu, logit >= 0", "deja_vu", "threshold", _same_bytes(1), parameter=0.5),
    Baseline("exact zeros (ReLU)", "oracle", "threshold", parameter=float(torch.finfo(torch.float32).tiny)),
    Baseline("sign bits", "sign_bit"),
    Baseline("static mean", "static"),
    Baseline("GRIFFIN", "griffin", needs_prompt=True),
    Baseline("random", "random"),
)
BASELINES: dict[str, Baseline] = {row.label: row for row in _ROWS}
"""Label -> row: oracles, published rules, predictors at equal bytes, floors. Dense FFNs of equal bytes are `forms`."""


def baseline(label: str) -> Baseline:
    """The row of a label; raises UnknownNameError with a suggestion."""
    if label not in BASELINES:
        raise unknown_name("row", label, BASELINES)
    return BASELINES[label]


def fit_predictors(
    model: nn.Module,
    traces: Traces,
    row: Baseline,
    *,
    sites: Sequence[FFNSite] | None = None,
    on_site: OnSite | None = None,
) -> dict[FFNSite, Predictor]:
    """Make the predictor of a row for every traced FFN, from the fitting part of the traces.

    Raises:
        UsageError: a row for gated FFNs and one without a gate, or no token of the part.
        ModelError: the weights of an FFN are offloaded.
    """
    chosen = list(traces.sites if sites is None else sites)
    factory, found = PREDICTORS.get(row.predictor), dict[FFNSite, Predictor]()
    for done, site in enumerate(chosen, 1):
        ffn = ffn_of(model, site, traces.activation(site))
        params = dict(row.params(ffn))
        if params.get("lookahead"):
            params["lookahead"] = 0 if traces.before(site) is None else 1
        tokens = traces.fit_tokens(site, lookahead=params.get("lookahead", 0))
        found[site] = factory.make(ffn, tokens, **params)
        if on_site is not None:
            on_site(done, len(chosen))
    return found


def at_density(
    traces: Traces, predictors: Mapping[FFNSite, Predictor], row: Baseline, density: float
) -> dict[FFNSite, Selector]:
    """Selectors of a row; the mean density over calibrating tokens is alike in all FFNs, and never above ``density``.

    A row with a parameter of its own has the density that this gives.

    Raises:
        UsageError: a density that the policy cannot meet.
    """
    found: dict[FFNSite, Selector] = {}
    for site, one in predictors.items():
        policy = row.make_policy(one, traces.fit_tokens(site, lookahead=one.lookahead), density)
        if row.parameter is not None:
            source = traces.before(site) if one.lookahead else None
            found[site] = Selector(one, policy, row.parameter, source)
            continue
        found[site] = site_at_density(traces, site, one, policy, density)
    return found


def site_at_density(traces: Traces, site: FFNSite, predictor: Predictor, policy: Policy, density: float) -> Selector:
    """The selector of one FFN, as `at_density`."""
    source = traces.before(site) if predictor.lookahead else None
    if isinstance(policy, TopK):  # needs no text
        return Selector(predictor, policy, math.floor(density * site.d_ff + 1e-9), source)
    tokens = traces.fit_tokens(site, "calibrate", lookahead=predictor.lookahead)
    chunks = scored_readings(predictor, readings_of(predictor, tokens), nonzero)
    return Selector(predictor, policy, calibrate_policy(policy, chunks, Target("density", density)).parameter, source)


def selectors_of(
    model: nn.Module, traces: Traces, row: Baseline, density: float, *, on_site: OnSite | None = None
) -> dict[FFNSite, Selector]:
    """Fit and calibrate a row at one density; for several, fit once and call `at_density`."""
    predictors = fit_predictors(model, traces, row, on_site=on_site)
    return at_density(traces, predictors, row, density)
