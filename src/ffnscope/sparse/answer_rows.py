"""What `ffnscope.sparse.answer` is asked, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.evaluate.intervals import Estimate
from ffnscope.sparse.calibration import Target
from ffnscope.sparse.card import WantedChannels
from ffnscope.sparse.labels import nonzero, top_mass
from ffnscope.sparse.measures import Label, Summary
from ffnscope.sparse.rule import SelectionRule
from ffnscope.sparse.traces import Traces

RULES = ("top_k", "threshold", "nucleus")
"""Policies that are compared; the first is what the others are compared with."""
OnStep = Callable[[str, int, int], None]
"""Called with what is being done, steps done, and steps in all."""


@dataclass(frozen=True, slots=True, eq=False)
class Domain:
    """A text domain.

    Attributes:
        traces: of the model on its documents.
        windows: held-out text to measure perplexity on; None leaves perplexity out.
    """

    traces: Traces
    windows: Windows | None = None


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """What the rules should reach, and by which scores.

    Attributes:
        target: what each FFN should reach on average over tokens.
        wanted: recall is about the fewest channels that miss at most this share of a token's contributions; None:
            about those that contribute anything (ReLU).
        predictor: name in the registry. It is fitted on the fitting documents of all domains, so that domains differ
            in the parameter alone.
        params: of the predictor.
        batch_size: windows per forward.
    """

    target: Target = field(default_factory=lambda: Target("recall", 0.95))
    wanted: float | None = WantedChannels().share
    predictor: str = "low_bit"
    params: Mapping[str, Any] = field(default_factory=lambda: {"bits": 4, "group": 64})
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.wanted is not None and not 0 < self.wanted < 1:
            raise UsageError(
                f"wanted must be in (0, 1), the share of the contributions that may be missed; got {self.wanted:g}. "
                "For the exact zeros of a ReLU model it is None (--wanted 0)."
            )
        rule = SelectionRule(self.predictor, RULES[0], self.params)
        if rule.lookahead or rule.prompt:
            why = "reads the input of another FFN" if rule.lookahead else "takes its scores from a prompt"
            raise UsageError(
                f"an answer compares rules on the same scores of single tokens, and {self.predictor} {why}. Choose "
                "another predictor, or sparsify, which makes a card with it."
            )

    @property
    def label(self) -> Label:
        """Which channels recall is about."""
        return nonzero if self.wanted is None else partial(top_mass, missed=self.wanted)


@dataclass(frozen=True, slots=True)
class Calibration:
    """The parameter of one rule in one FFN, calibrated on one domain.

    Attributes:
        domain: name.
        site: name of the FFN.
        layer: its layer.
        rule: of `RULES`.
        parameter: k, threshold or p.
        reached: the measure of the target on held-out documents of the domain.
        density: share of channels kept there, over tokens.
    """

    domain: str
    site: str
    layer: int
    rule: str
    parameter: float
    reached: Estimate
    density: Summary


@dataclass(frozen=True, slots=True, eq=False)
class EqualDensity:
    """One rule on held-out documents of one domain, calibrated in every FFN to the density that top-k has there.

    Attributes:
        domain: name.
        rule: of `RULES`.
        measures: name of a measure -> mean over tokens and FFNs.
        against: the same less that of top-k, paired by document; empty for top-k.
        perplexity: with the rule in all FFNs; None without windows.
        dense_perplexity: of the dense model on the same windows.
        loss: mean NLL less that of top-k, nats per token, paired by document; None for top-k and without windows.
        text_density: share of channels kept on these windows, mean of FFNs; None without windows.
    """

    domain: str
    rule: str
    measures: Mapping[str, Estimate]
    against: Mapping[str, Estimate]
    perplexity: float | None = None
    dense_perplexity: float | None = None
    loss: Estimate | None = None
    text_density: float | None = None


@dataclass(frozen=True, slots=True)
class Reuse:
    """Parameters of one domain on held-out documents of another.

    Attributes:
        calibrated_on: whose parameters.
        used_on: whose documents.
        rule: of `RULES`.
        reached: the measure of the target, over tokens and FFNs.
        difference: that less what the domain's own parameters reach, paired by document.
        density: mean share of channels kept.
        density_difference: that less the density of the domain's own parameters.
    """

    calibrated_on: str
    used_on: str
    rule: str
    reached: Estimate
    difference: Estimate
    density: float
    density_difference: float


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What was found; see `ffnscope.report.answer_table` for the page.

    Attributes:
        options: what was asked.
        domains: names.
        calibrations: by domain, FFN and rule.
        equal: by domain and rule.
        reuse: by pair of domains and rule.
        rule: the recommended one.
        reason: why, in sentences.
    """

    options: AnswerOptions
    domains: tuple[str, ...]
    calibrations: tuple[Calibration, ...]
    equal: tuple[EqualDensity, ...]
    reuse: tuple[Reuse, ...]
    rule: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        options = self.options
        return {
            "target": asdict(options.target),
            "wanted_missed_mass": options.wanted,
            "predictor": {"name": options.predictor, "params": dict(options.params)},
            "domains": list(self.domains),
            "recommended": {"rule": self.rule, "reason": self.reason},
            "parameters": [asdict(one) for one in self.calibrations],
            "equal_density": [_equal_row(one) for one in self.equal],
            "reuse": [asdict(one) for one in self.reuse],
        }


def _equal_row(one: EqualDensity) -> dict[str, Any]:
    return {
        "domain": one.domain,
        "rule": one.rule,
        "measures": {name: asdict(value) for name, value in one.measures.items()},
        "against_top_k": {name: asdict(value) for name, value in one.against.items()},
        "perplexity": one.perplexity,
        "text_density": one.text_density,
        "dense_perplexity": one.dense_perplexity,
        "loss_against_top_k": None if one.loss is None else asdict(one.loss),
    }
