"""What a wrapped model does while it decodes, against what it did on calibration documents; dense when it drifts."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.sparse.card import Band, SiteCard, SparsityCard
from ffnscope.sparse.measures import Label, of_mask, truths
from ffnscope.sparse.predictors.fixed import Constant
from ffnscope.sparse.predictors.interface import Prompted
from ffnscope.sparse.products import Products
from ffnscope.sparse.selector import HandsOn, Noted, Selector
from ffnscope.types import FFNSite

HORIZON = 64
"""Tokens that a running mean remembers, in the sense of its decay 1 - 1 / HORIZON; it is judged after as many."""
SIGNALS = ("density", "kept_mass")
"""What is watched: share of the channels that are kept, and of the token's scores that these have."""
_SLACK = 1e-6


@dataclass(frozen=True, slots=True)
class MonitorOptions:
    """How decoding is watched.

    Attributes:
        audit_every: of so many tokens one is audited in one FFN, each in turn: its contributions are computed in full,
            to see what is missed. The text does not depend on it. None audits nothing.
        margin: by how much a band is widened to either side, as a share of its width, before there is an alarm.
        fallback: run an FFN dense while it is outside of its bands.
        min_kept_mass: run an FFN dense for a token of whose scores the kept channels have a smaller share than this.
    """

    audit_every: int | None = 64
    margin: float = 0.5
    fallback: bool = True
    min_kept_mass: float = 0.0

    def __post_init__(self) -> None:
        if (self.audit_every is not None and self.audit_every < 1) or self.margin < 0:
            raise UsageError(
                f"audit_every must be at least 1 and margin not negative; got {self.audit_every}, {self.margin:g}."
            )
        if not 0 <= self.min_kept_mass <= 1:
            raise UsageError(
                f"min_kept_mass must be in [0, 1], a share of a token's scores; got {self.min_kept_mass:g}."
            )


@dataclass(frozen=True, slots=True)
class Drift:
    """What one FFN did.

    Attributes:
        site: which.
        tokens: that were decoded.
        values: running mean of each of `SIGNALS`.
        outside: whether one of them is outside of its band now.
        alarms: how often it went outside.
        audits: audited tokens.
        audited: measure -> mean over them; empty without any.
    """

    site: FFNSite
    tokens: int
    values: Mapping[str, float]
    outside: bool
    alarms: int
    audits: int
    audited: Mapping[str, float]


@dataclass(slots=True)
class RunningMean:
    """A mean of values in which one that came n tokens ago weighs (1 - 1 / HORIZON)^n."""

    total: float = 0.0
    weight: float = 0.0
    tokens: int = 0

    def add(self, value: float, n: int = 1) -> None:
        """Add the mean of ``n`` tokens."""
        left = (1 - 1 / HORIZON) ** n
        self.total, self.weight = self.total * left + value * (1 - left), self.weight * left + (1 - left)
        self.tokens += n

    @property
    def value(self) -> float:
        """The mean; 0 before the first token."""
        return self.total / self.weight if self.weight else 0.0


def band_of(values: Tensor) -> Band:
    """p1 and p99 of the running mean over values [T] of tokens in their order, after `HORIZON` (or half of them)."""
    mean, seen = RunningMean(), list[float]()
    for value in values.tolist():
        mean.add(value)
        seen.append(mean.value)
    kept = torch.tensor(seen[min(HORIZON, len(seen) // 2) :], dtype=torch.float64)
    low, high = (float(kept.quantile(share)) for share in (0.01, 0.99))
    return low, high


def signals(scores: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """`SIGNALS` of every token [T] from scores and mask [T, d_ff]."""
    total = scores.sum(-1)
    kept = (scores * mask).sum(-1) / total.where(total > 0, 1.0)
    return {"density": mask.float().mean(-1), "kept_mass": kept.where(total > 0, 1.0)}


@dataclass(slots=True, eq=False)
class Watched:
    """A selector that notes what it does; called like it. ``own`` is where it hands on its input, if one reads that."""

    card: SiteCard
    selector: Selector
    label: Label
    options: MonitorOptions
    offset: int
    period: int | None
    means: dict[str, RunningMean] = field(default_factory=lambda: {name: RunningMean() for name in SIGNALS})
    audited: dict[str, float] = field(default_factory=dict[str, float])
    audits: int = 0
    alarms: int = 0
    outside: bool = False
    steps: int = 0
    own: Noted | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Inputs [T, d_model] -> mask [T, d_ff]; all channels while outside of a band and ``fallback`` is on."""
        return self.select_and_read(x)[0]

    @torch.no_grad()
    def select_and_read(self, x: Tensor) -> tuple[Tensor, Products]:
        """The mask, and products that the predictor has made, which need not be made again."""
        if self.own is not None:
            self.own.x = x
        scores, known = self.selector.score_and_read(x)
        return self._watched(x, scores), known

    def _watched(self, x: Tensor, scores: Tensor) -> Tensor:
        """The mask [T, d_ff] of scores [T, d_ff], noted."""
        mask = self.selector.of_scores(scores)
        seen = signals(scores, mask)
        for name, values in seen.items():
            self.means[name].add(float(values.mean()), len(values))
        self.steps += 1
        if self.period is not None and self.steps % self.period == self.offset:
            self._audit(x[:1], mask[:1])
        before, self.outside = self.outside, self._is_outside()
        if self.outside and not before:
            self.alarms += 1
        if self.outside and self.options.fallback:
            return torch.ones_like(mask)
        return mask | (seen["kept_mass"] < self.options.min_kept_mass)[:, None]

    def fresh(self) -> Watched:
        """The same, which has seen nothing and stands alone: a predictor that looks ahead reads what is given."""
        predictor = self.selector.predictor
        if isinstance(predictor, Prompted):  # whose prompt may not have come yet
            predictor = Constant(predictor.ffn, torch.ones(predictor.ffn.d_ff, device=predictor.ffn.down_norms.device))
        alone = replace(self.selector, predictor=predictor, source=None, noted=None)
        return Watched(self.card, alone, self.label, self.options, self.offset, self.period)

    def drift(self) -> Drift:
        """What was seen."""
        values = {name: mean.value for name, mean in self.means.items()}
        audited = {name: total / self.audits for name, total in self.audited.items()}
        tokens = self.means["density"].tokens
        return Drift(self.card.site, tokens, values, self.outside, self.alarms, self.audits, audited)

    def _audit(self, x: Tensor, mask: Tensor) -> None:
        for _, truth in truths(self.selector.predictor.ffn, x, self.label):
            for name, values in of_mask(mask, truth).items():
                self.audited[name] = self.audited.get(name, 0.0) + float(values.sum())
        self.audits += 1

    def _is_outside(self) -> bool:
        for name, (low, high) in self.card.bands.items():
            mean, slack = self.means[name], self.options.margin * (high - low) + _SLACK
            if mean.tokens >= HORIZON and not low - slack <= mean.value <= high + slack:
                return True
        return False


class Monitor:
    """Watches the FFNs of a card while its model decodes.

    Attributes:
        selectors: site -> selector that notes what it does, for `wrap_`. Where predictors look ahead, FFNs that stay
            dense and whose input is read are there too, and select all channels.
    """

    def __init__(
        self, card: SparsityCard, selectors: Mapping[FFNSite, Selector], options: MonitorOptions | None = None
    ):
        options = options or MonitorOptions()
        cards = {one.site: one for one in card.sites}
        every = options.audit_every
        period = None if every is None else every * len(selectors)
        self._warned = False
        noted = {rule.source: Noted() for rule in selectors.values() if rule.source is not None}
        self.selectors: dict[FFNSite, Watched | HandsOn] = {}
        for i, (site, rule) in enumerate(selectors.items()):
            rule = rule if rule.source is None else replace(rule, noted=noted[rule.source])
            watched = Watched(cards[site], rule, card.wanted.label, options, (every or 0) * i, period)
            watched.own = noted.get(site)
            self.selectors[site] = watched
        self.selectors |= {s: HandsOn(s.d_ff, own) for s, own in noted.items() if s not in selectors}

    @property
    def watched(self) -> dict[FFNSite, Watched]:
        """The selectors without those of dense FFNs that only hand on their input."""
        return {site: one for site, one in self.selectors.items() if isinstance(one, Watched)}

    def report(self) -> tuple[Drift, ...]:
        """What every FFN did, in the order of the model."""
        return tuple(one.drift() for one in self.watched.values())

    def leave(self, sites: Collection[FFNSite]) -> None:
        """Watch FFNs no more that run dense; those whose input others still read hand it on."""
        rest = {site: one for site, one in self.watched.items() if site not in sites}
        read = {one.selector.source for one in rest.values()}
        others = {site: one for site, one in self.selectors.items() if site not in rest and site in read}
        handing = {site: HandsOn(site.d_ff, one.own) for site, one in others.items() if one.own is not None}
        self.selectors = {**rest, **handing}

    @property
    def drifting(self) -> tuple[FFNSite, ...]:
        """FFNs that are outside of a band now."""
        return tuple(site for site, one in self.selectors.items() if isinstance(one, Watched) and one.outside)

    def check(self) -> None:
        """Warn, once, when FFNs are outside of their bands."""
        found = self.drifting
        if found and not self._warned:
            self._warned = True
            first = self.watched[found[0]]
            values = ", ".join(f"{name} {mean.value:.3f}" for name, mean in first.means.items())
            bands = ", ".join(f"{name} {low:.3f} to {high:.3f}" for name, (low, high) in first.card.bands.items())
            then = "run dense" if first.options.fallback else "go on as they are"
            warnings.warn(
                f"this text is unlike the calibration's in {len(found)} FFN(s), which {then}: {found[0].name} has "
                f"{values}; the card says {bands}.",
                stacklevel=2,
            )
