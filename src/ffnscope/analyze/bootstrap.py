"""Bootstrap over documents: scores of texts whose documents are drawn anew, from sums by groups of documents.

A score that is a function of sums of vectors ([d_ff] or [d_model]) can be computed for any number of copies of each
document without running the model again. Documents are drawn with replacement, in groups where there are more of them
than `PassOptions.document_groups`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.calibrate.collect import MetricChoice, required_statistics
from ffnscope.errors import UsageError
from ffnscope.ffn.offload import materialised
from ffnscope.ffn.projection import weights_of
from ffnscope.registry import METRICS, STATISTICS, by_document
from ffnscope.types import ChannelStats, FFNSite

LEVEL = 0.95
TOKENS, TARGETS = "tokens_by_document", "targets_by_document"
Interval = tuple[float, float]


def bootstrap_statistics(metrics: MetricChoice) -> list[str]:
    """Names of the sums by document that a bootstrap of these metrics needs; those that have none are left out."""
    chosen = metrics if isinstance(metrics, Mapping) else {name: {} for name in metrics}
    able = {name: params for name, params in chosen.items() if why_not(name, params) is None}
    names = required_statistics(able)
    marks = {TARGETS if STATISTICS.get(name).needs_gradient else TOKENS: None for name in names}
    return [*(by_document(name) for name in names), *marks]


def why_not(metric: str, params: Mapping[str, Any]) -> str | None:
    """Why a metric has no bootstrap over documents, or None when it has."""
    rule = METRICS.get(metric)
    needs = rule.needed(params)
    if not needs:
        return "no text"
    if rule.scope == "model" or rule.inputs:
        return "needs more than sums of one FFN"
    known = STATISTICS.names()
    large = [name for name in needs if by_document(name) not in known]
    return f"needs {large[0]}, which is no sum of vectors" if large else None


@dataclass(frozen=True, slots=True, eq=False)
class Bootstrap:
    """Sums by document, from which scores of other draws of the documents are made.

    Attributes:
        model: gives the weights; not run.
        stats: what a calibration collected, with the statistics of `bootstrap_statistics`.
        draws: how often the documents are drawn anew.
        seed: of the draws.

    Raises:
        UsageError: fewer than 2 draws.
    """

    model: nn.Module
    stats: Mapping[FFNSite, ChannelStats]
    draws: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 2:
            raise UsageError(f"a bootstrap needs at least 2 draws, better 200; got {self.draws}.")

    @property
    def groups(self) -> int:
        """Number of groups of documents; 0 when none were collected."""
        sizes = [p.values[n].shape[0] for p in self.stats.values() for n in (TOKENS, TARGETS) if n in p.values]
        return sizes[0] if sizes else 0

    def copies(self) -> Tensor:
        """How often each group is in each draw; [draws, groups], rows sum to the number of groups."""
        size = (self.draws, self.groups)
        drawn = torch.randint(self.groups, size, generator=torch.Generator().manual_seed(self.seed))
        return torch.zeros(size, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(size, dtype=torch.float64))

    def refusal(self, metric: str, params: Mapping[str, Any]) -> str | None:
        """Why there are no draws of a metric, or None."""
        reason = why_not(metric, params)
        if reason is not None:
            return reason
        if self.groups < 2:
            return "one document" if self.groups else "no sums by document were collected"
        missing = [n for n in bootstrap_statistics({metric: params}) for p in self.stats.values() if n not in p.values]
        return f"{missing[0]} was not collected" if missing else None

    def scores(self, site: FFNSite, metric: str, params: Mapping[str, Any], copies: Tensor) -> Tensor:
        """Scores of one site for each row of ``copies`` [n, groups]; [n, d_ff] float64, NaN where a draw has no token.

        Raises:
            UsageError: there is no bootstrap of this metric (see `refusal`).
        """
        reason = self.refusal(metric, params)
        if reason is not None:
            raise UsageError(f"metric {metric!r} has no bootstrap over documents: {reason}.")
        rule, part = METRICS.get(metric), self.stats[site]
        names = rule.needed(params)
        with materialised(self.model, site), torch.no_grad():
            weights = weights_of(self.model, site)
            device = weights.down.device if weights.down.device.type != "mps" else torch.device("cpu")
            rows = [self._drawn(part, names, row, device) for row in copies.double()]
            found = [None if one is None else rule.fn(one, weights, **params) for one in rows]
        empty = torch.full((site.d_ff,), torch.nan, dtype=torch.float64)
        return torch.stack([empty if one is None else one.double().cpu() for one in found])

    def _drawn(
        self, part: ChannelStats, names: Sequence[str], copies: Tensor, device: torch.device
    ) -> ChannelStats | None:
        """Statistics of one draw; None without a token."""
        kinds = {name: TARGETS if STATISTICS.get(name).needs_gradient else TOKENS for name in names}
        counts = {name: round(float(copies @ part.values[mark])) for name, mark in kinds.items()}
        if not all(counts.values()):
            return None
        values = {name: (copies @ part.values[by_document(name)]).to(device) for name in names}
        return ChannelStats(part.site, values, counts, dict.fromkeys(names, "sum"))


def bootstrap_interval(value: float, drawn: Tensor, groups: int, bounds: Interval) -> Interval | None:
    """95 % interval of ``value`` from bootstrap draws [n] over ``groups`` of documents, within ``bounds``.

    The standard deviation of the draws times Student's t with groups - 1 degrees of freedom, around the value less the
    bootstrap's estimate of its bias: noise makes a distribution look more concentrated than it is, and percentiles of
    draws, which add noise once more, would be wrong twice. The interval always holds the value itself. None where draws
    are not defined (NaN).
    """
    from scipy.stats import t

    if groups < 2 or not bool(torch.isfinite(drawn).all()):
        return None
    middle = 2 * value - float(drawn.mean())
    half = float(t.ppf((1 + LEVEL) / 2, groups - 1)) * float(drawn.std()) * math.sqrt(groups / (groups - 1))
    low, high = min(value, middle - half), max(value, middle + half)
    return max(bounds[0], low), min(bounds[1], high)
