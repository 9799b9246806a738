"""The contextual block of a configuration: which channels each token needs, calibrated to a target."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, StrictBool, StrictStr
from pydantic.types import Strict

from ffnscope.errors import UsageError
from ffnscope.registry import POLICIES, PREDICTORS, Registry
from ffnscope.run.fields import Block, Distinct, Fraction, Keywords, Share, did_you_mean, refuse
from ffnscope.run.texts import TextSource
from ffnscope.sparse.card import WantedChannels
from ffnscope.sparse.card_options import Allocation, CardOptions, CardTarget, Certify, parse_target, wanted_channels
from ffnscope.sparse.certificate import Method
from ffnscope.sparse.rivals import RIVALS, USUAL
from ffnscope.sparse.rule import SelectionRule, rule_of
from ffnscope.sparse.tracing import TraceOptions


def _known(registry: Registry[Any]) -> Any:
    def check(name: str) -> str:
        known = sorted(registry.names())
        if name not in known:
            raise refuse(f"unknown {registry.kind} {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}")
        return name

    return AfterValidator(check)


def _target(text: str) -> str:
    try:
        parse_target(text)
    except UsageError as error:
        raise refuse(str(error).rstrip(".")) from error
    return text


def _rival(label: str) -> str:
    if label not in RIVALS:
        raise refuse(f"unknown row {label!r}.{did_you_mean(label, RIVALS)} Known: {', '.join(RIVALS)}")
    return label


class SecondText(TextSource):
    """Another text, to see what a calibrated selection does there."""


class Contextual(Block):
    """Contextual sparsity: calibrate which channels each token needs, and measure what that does."""

    enabled: StrictBool = False
    """Trace the calibration windows, fit a sparsity card, and write it to contextual/card.json."""
    target: Annotated[StrictStr, AfterValidator(_target)] = "recall=0.95"
    """recall=, missed_mass=, density=, relative_error= (of every FFN), perplexity=+1%, bytes=50% of the
    dense FFNs, or parameter= of the policy."""
    predictor: Annotated[StrictStr, _known(PREDICTORS)] = "low_bit"
    """What scores the channels of a token: low_bit, low_rank, whitened_svd, static, griffin, fc_files, oracle, ..."""
    predictor_params: Keywords = Field(default_factory=dict)
    """Parameters of the predictor (`ffnscope predictors list`); low_bit has bits: 4 and group: 64 unless they are
    here, griffin prompt: 32."""
    policy: Annotated[StrictStr, _known(POLICIES)] = "nucleus"
    """Rule that keeps channels by their scores: nucleus, threshold, top_k, hybrid, ..."""
    policy_params: Keywords = Field(default_factory=dict)
    """Parameters of the policy."""
    certify: Method | None = None
    """Promise the target for new documents; null: meet it on the calibration documents."""
    failure: Fraction | None = None
    """Of split_conformal and learn_then_test: how often the promise may fail; null: 0.1."""
    allocation: Allocation = "uniform"
    """The same density in every FFN, or densities by curves of damage: relative_error, fisher or measured."""
    floor: Share | None = None
    """Lowest density of the first and the last layer in an allocation; null: 0.3."""
    wanted: Annotated[float, Strict(), Field(ge=0, lt=1)] = WantedChannels().share
    """Recall is about the fewest channels that miss this share of a token's contributions; 0: all that are not zero."""
    max_traces: Annotated[float, Strict(), Field(gt=0, lt=2**20)] = TraceOptions().max_bytes / 2**30
    """GiB of disk that the traces of a text may take."""
    second: SecondText | None = None
    """Another text, to see what the card does there; null: the first of evaluation.extra, if there is one."""
    curves: Annotated[tuple[Fraction, ...], Distinct] = ()
    """Densities at which the perplexity of this rule and of others is measured."""
    against: Annotated[tuple[Annotated[StrictStr, AfterValidator(_rival)], ...], Distinct] = USUAL
    """The others, of which `ffnscope predictors list` tells the names."""

    @property
    def rule(self) -> SelectionRule:
        """Predictor and policy; raises UsageError for impossible parameters."""
        return rule_of(self.predictor, self.policy, self.predictor_params, self.policy_params)

    @property
    def card_target(self) -> CardTarget:
        """What is wanted."""
        return parse_target(self.target)

    def options(self, batch_size: int) -> CardOptions:
        """How the card is fitted."""
        certify = None if self.certify is None else Certify(self.certify, self.failure or Certify().failure)
        floor = CardOptions().floor if self.floor is None else self.floor
        return CardOptions(wanted_channels(self.wanted), certify, self.allocation, floor, batch_size=batch_size)
