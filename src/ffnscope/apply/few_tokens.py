"""How many tokens a least squares wants, and what is said before any work where a text has fewer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from ffnscope.apply.one_shot import TOKENS_PER_CHANNEL
from ffnscope.calibrate.forward import experts_per_token
from ffnscope.types import FFNSite

FEW = "will be fitted on fewer tokens than"
"""In the sentence of `few_tokens`."""


def tokens_wanted(model: nn.Module, sites: Sequence[FFNSite]) -> int:
    """Tokens of text that give every FFN 4 per channel, if routers give all experts of a layer as many."""
    shares = _shares(model, sites)
    return max((math.ceil(TOKENS_PER_CHANNEL * site.d_ff / shares[site]) for site in sites), default=0)


def few_tokens(model: nn.Module, sites: Sequence[FFNSite], n_tokens: int) -> str | None:
    """What to say where a text of ``n_tokens`` gives an FFN fewer than 4 tokens per channel; None where it does not."""
    shares = _shares(model, sites)
    few = [site for site in sites if n_tokens * shares[site] < TOKENS_PER_CHANNEL * site.d_ff]
    if not few:
        return None
    worst = min(few, key=lambda site: shares[site] / site.d_ff)
    about = "" if worst.expert is None else "about "
    return (
        f"{len(few)} of {len(sites)} FFNs {FEW} {TOKENS_PER_CHANNEL} d_ff "
        f"({worst.name}: {about}{n_tokens * shares[worst]:,.0f} tokens for {worst.d_ff:,} channels), which fits noise; "
        f"{tokens_wanted(model, sites):,} tokens of text would do"
    )


def _shares(model: nn.Module, sites: Sequence[FFNSite]) -> Mapping[FFNSite, float]:
    """Share of the tokens that each FFN is expected to see: all, or of an expert its even part of those routed."""
    experts: dict[int, int] = {}
    for site in sites:
        if site.expert is not None:
            experts[site.layer] = max(experts.get(site.layer, 0), site.expert + 1)
    routed = experts_per_token(model) if experts else 1
    return {site: 1.0 if site.expert is None else min(1.0, routed / experts[site.layer]) for site in sites}
