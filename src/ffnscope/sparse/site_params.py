"""What the predictor of each FFN is given beside the parameters of a rule: its layer, and the norm before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.errors import NotAvailableError, UsageError, unknown_name
from ffnscope.ffn.function import FFN
from ffnscope.ffn.offload import materialised
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.stream_probe import Call, last_norm, observe_stream
from ffnscope.sparse.predictors.interface import by_name
from ffnscope.sparse.rule import SelectionRule
from ffnscope.types import FFNSite

TOLERANCE = 1e-2
"""Largest deviation from an RMS norm, as a share of its largest output; norms of low precision round."""


def site_params(rule: SelectionRule, model: nn.Module, sites: Sequence[FFNSite]) -> dict[FFNSite, dict[str, Any]]:
    """Further keyword arguments of the predictor's factory, FFN by FFN; empty for most rules.

    Raises:
        UsageError: a parameter by name for an FFN that is not there.
        NotAvailableError: files per layer for a model with several FFNs in a layer, or whose norms are no RMS norms.
    """
    check_names(rule, sites)
    if rule.predictor != "fc_files":
        return {site: {} for site in sites}
    given = sorted({"layer", "norm"} & set(rule.predictor_params))
    if given:
        raise UsageError(f"{given[0]} of predictor 'fc_files' is found for each FFN; leave it out.")
    if len({site.layer for site in sites}) < len(sites):
        raise NotAvailableError("fc_files has one file per layer, and this model has several FFNs in a layer.")
    norms = ffn_norms(model, sites) if rule.predictor_params.get("before_norm", True) else {}
    return {site: {"layer": site.layer, "norm": norms.get(site)} for site in sites}


def check_predictor_params(rule: SelectionRule, model: nn.Module, sites: Sequence[FFNSite]) -> None:
    """Raise before any work what making the predictors would, as far as that needs no tokens.

    Raises:
        UsageError: an impossible value.
        ArtifactError: a file that is missing, damaged, or of another model.
        NotAvailableError: see `site_params`.
    """
    params, given = site_params(rule, model, sites), rule.predictor_params
    from_files = rule.predictor == "fc_files" or given.get("plan") is not None
    for site in sites if from_files else sites[: rule.predictor == "low_bit"]:
        with materialised(model, site):
            ffn = FFN(weights_of(model, site), torch.relu, site.name)
            rule.own(ahead=False, params=params[site]).make_predictor(ffn, None)
    for site in sites if "rank" in given else ():
        with materialised(model, site):
            rank = by_name(given["rank"], FFN(weights_of(model, site), torch.relu, site.name), "rank")
        most = min(site.d_model, site.d_ff)
        if not 1 <= rank <= most:
            raise UsageError(f"rank must be in [1, {most}] for {site.name}; got {rank}.")


def check_names(rule: SelectionRule, sites: Sequence[FFNSite]) -> None:
    """Raise UnknownNameError for a parameter by name whose FFN is not there, with the nearest name."""
    names = {site.name for site in sites}
    for key, value in rule.predictor_params.items():
        for name in value if isinstance(value, Mapping) else ():
            if name != "*" and name not in names:
                raise unknown_name(f"FFN in {key} of predictor {rule.predictor!r}", name, [*names, "*"])


def ffn_norms(model: nn.Module, sites: Sequence[FFNSite]) -> dict[FFNSite, Tensor]:
    """Weights [d_model] of the RMS norm before each FFN, as it acts; the model is run once and left as it was.

    Raises:
        NotAvailableError: an expert, no norm before an FFN, or one that is no RMS norm, in front of which the same
            predictor would need a bias and the mean.
    """
    expert = next((site for site in sites if site.expert is not None), None)
    if expert is not None:
        raise NotAvailableError(f"{expert.name} is an expert; predictors before a norm are for dense FFNs.")
    seen, found = observe_stream(model, sites), dict[FFNSite, Tensor]()
    for site in sites:
        call = seen.projections.get(f"{site.path}.{site.up}" if site.path else site.up)
        name = None if call is None else last_norm(seen, output=call.x, before=call.when)
        weight = None if name is None else _rms_weight(seen.norms[name])
        if weight is None:
            raise NotAvailableError(
                f"there is no RMS norm right before {site.name}, so a predictor of what is before it and one of the "
                "input of the FFN cannot be turned into each other. Use predictors of the input: before_norm=false."
            )
        found[site] = weight
    return found


def _rms_weight(call: Call) -> Tensor | None:
    """w where rows y are x times w times a number per row; None where they are not."""
    scale = 1 / call.x.square().mean(1).sqrt().clamp_min(1e-30)
    weight = torch.ones(call.x.shape[1], dtype=call.x.dtype)
    for _ in range(8):  # in turn: weights for the scales, scales for the weights; eps makes these differ a little
        scaled = call.x * scale[:, None]
        weight = (scaled * call.y).sum(0) / scaled.square().sum(0).clamp_min(1e-30)
        shaped = call.x * weight
        scale = (shaped * call.y).sum(1) / shaped.square().sum(1).clamp_min(1e-30)
    error = float((call.y - call.x * scale[:, None] * weight).abs().max())
    if error > TOLERANCE * float(call.y.abs().max()):
        return None
    return weight * float((scale * call.x.square().mean(1).sqrt()).median())


def check_layers(sites: Sequence[FFNSite]) -> None:
    """Raise UsageError unless there is one FFN for each layer from 0."""
    if [site.layer for site in sites] != list(range(len(sites))):
        raise UsageError(
            f"files are numbered by layer, one FFN in each from 0; this card has {len(sites)} FFNs in the layers "
            f"{', '.join(str(site.layer) for site in sites[:8])}, ..."
        )
