"""Top-k or threshold, and which k? Both rules, calibrated and measured on a model and texts, with what reuse costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ffnscope.errors import UsageError
from ffnscope.sparse.answer_choice import recommend
from ffnscope.sparse.answer_rows import Answer, AnswerOptions, Domain, OnStep
from ffnscope.sparse.answer_steps import calibrate_rules, equal_rows, measure_rules, reuse_rows
from ffnscope.types import FFNSite


def answer(
    model: nn.Module,
    domains: Mapping[str, Domain],
    *,
    options: AnswerOptions | None = None,
    sites: Sequence[FFNSite] | None = None,
    on_step: OnStep | None = None,
) -> Answer:
    """Answer for a model and some text domains: which rule, which parameter per layer, and what does reuse cost?

    Each rule is calibrated in each FFN and domain to the target, on the calibrating documents, and measured on the
    test documents of every domain. Threshold and nucleus are then calibrated anew to the density of top-k, so that the
    rules are compared at one cost, in perplexity too.

    Args:
        model: in memory; left as it was.
        domains: name -> traces and windows, two or more; traces of the same FFNs.
        options: target, predictor.
        sites: FFNs; None takes those of the traces.
        on_step: see `OnStep`.

    Raises:
        UsageError: fewer than two domains, traces that lack an FFN, or a target that a rule cannot meet.
    """
    options = options or AnswerOptions()
    if len(domains) < 2:
        raise UsageError(f"an answer compares text domains; got {len(domains)}. Give two or more, better three.")
    chosen = tuple(next(iter(domains.values())).traces.sites if sites is None else sites)
    for name, domain in domains.items():
        missing = [site.name for site in chosen if site not in domain.traces.files]
        if missing:
            raise UsageError(f"the traces of {name!r} lack {missing[0]}; trace the same FFNs in every domain.")
    rules = calibrate_rules(model, domains, chosen, options, on_step)
    measured = measure_rules(domains, rules, options, on_step)
    equal = equal_rows(model, domains, rules, measured, options, on_step)
    reuse = reuse_rows(list(domains), measured, options)
    rule, reason = recommend(equal, reuse, measured.calibrations, options.target)
    return Answer(options, tuple(domains), tuple(measured.calibrations), equal, reuse, rule, reason)
