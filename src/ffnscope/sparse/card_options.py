"""What a card is fitted to: targets, certificates, allocations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError, unknown_name
from ffnscope.sparse.calibration import Measure, Target
from ffnscope.sparse.card import WantedChannels
from ffnscope.sparse.certificate import Method, PValue, bootstrap, hoeffding_bentkus
from ffnscope.sparse.split import Part
from ffnscope.sparse.traces import Traces
from ffnscope.types import FFNSite

OnSiteEpoch = Callable[[FFNSite, int, int, float], None]
"""Called with the FFN, epochs done, epochs at most, and the missed mass on the tokens that training is judged by."""
Allocation = Literal["uniform", "relative_error", "fisher", "measured"]
DENSITIES = tuple(round(0.95 - 0.05 * i, 2) for i in range(19))
"""Settings of which a certificate or an allocation measures many."""
FINE_DENSITIES = tuple(round(0.99 - 0.01 * i, 2) for i in range(99))
"""Settings among which one density is bisected."""
LOSS_STEPS = tuple((i + 1) / 16 for i in range(24))
"""Settings of a certificate for recall or missed mass, as shares of the loss that is allowed."""
CAP = 10.0
"""A document's rise of the loss counts up to so many times the allowed one, since a certificate needs a bound."""


@dataclass(frozen=True, slots=True)
class PerplexityTarget:
    """How much the perplexity may rise.

    Attributes:
        increase: share of the dense perplexity: 0.01 is +1 %.
    """

    increase: float

    def __post_init__(self) -> None:
        if not 0 < self.increase <= 10:
            raise UsageError(
                f"the increase of the perplexity must be in (0, 10], 0.01 for +1 %; got {self.increase:g}."
            )

    @property
    def nats(self) -> float:
        """Rise of the mean NLL per token."""
        return math.log1p(self.increase)


@dataclass(frozen=True, slots=True)
class ParameterTarget:
    """The parameter of the policy itself, the same in every FFN: nothing is calibrated, all is measured.

    For rules that come with one: a score of 0.5 of predictors trained for that, the kept channels of a pruning plan
    (score 1, others 0), a k.

    Attributes:
        value: of the policy's parameter.
    """

    value: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise UsageError(f"the parameter of the policy must be finite; got {self.value}.")


@dataclass(frozen=True, slots=True)
class BytesTarget:
    """A budget of bytes: the highest of `CardOptions.settings` at which all FFNs and predictors read no more.

    Per token, of `ffnscope.sparse.costs.UNIT`. Of kept channels it is one of FLOPs as well, two for each weight.

    Attributes:
        share: of the bytes of the dense FFNs.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UsageError(
                f"a budget of bytes must be in (0, 1), a share of those of the dense FFNs; got {self.share:g}. Write "
                "bytes=0.5, or bytes=50%."
            )


CardTarget = Target | PerplexityTarget | ParameterTarget | BytesTarget
_TARGETS = {"perplexity": PerplexityTarget, "parameter": ParameterTarget, "bytes": BytesTarget}
"""What is no measure of `Target`, by the name that it is asked for with."""


def measure_and_value(target: CardTarget) -> tuple[str, float]:
    """A target as a card holds it."""
    if isinstance(target, ParameterTarget):
        return "parameter", target.value
    if isinstance(target, BytesTarget):
        return "bytes", target.share
    return ("perplexity", target.increase) if isinstance(target, PerplexityTarget) else (target.measure, target.value)


def parse_target(text: str) -> CardTarget:
    """Parse ``MEASURE=VALUE``: recall=0.95, missed_mass=0.1, density=0.3, relative_error=0.2, perplexity=+1%,
    bytes=50%, of the dense FFNs, or parameter=0.5, that of the policy itself.

    Raises:
        UsageError: another form, an unknown measure, or an impossible value.
    """
    measure, equals, value = text.partition("=")
    try:
        percent = value.endswith("%")
        number = float(value.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        equals = ""
        number = 0.0
    if not equals:
        raise UsageError(
            f"the target {text!r} is not MEASURE=VALUE, for example recall=0.95, missed_mass=0.1, density=0.3, "
            "relative_error=0.2, perplexity=+1%, bytes=50%, of the dense FFNs, or parameter=0.5, that of the policy "
            "itself."
        )
    if measure in _TARGETS:
        return _TARGETS[measure](number)
    if number == 0 and measure in ("recall", "density"):
        raise UsageError(
            f"the target {text!r} would keep no channel at all; give a share above 0, such as {measure}=0.3."
        )
    if measure not in get_args(Measure):
        raise unknown_name("target", measure, (*get_args(Measure), *_TARGETS))
    return Target(measure, number)  # type: ignore[arg-type]


def wanted_channels(share: float) -> WantedChannels:
    """The channels that recall is about: the fewest that miss a share of the contributions; 0: all that are not zero.

    Raises:
        UsageError: no share in [0, 1).
    """
    if not 0 <= share < 1:
        raise UsageError(f"wanted must be in [0, 1), the share of the contributions that may be missed; got {share:g}.")
    return WantedChannels("top_mass", share) if share else WantedChannels("nonzero")


@dataclass(frozen=True, slots=True)
class Certify:
    """Choose the setting so that the target is promised for new documents, instead of met on the calibration's.

    The loss of a document is 1 - recall, the missed mass or the relative error (at most 1), over its tokens and all
    FFNs; or its rise of the NLL per token, from 0 up to `CAP` times the allowed one and over that.

    Attributes:
        method: see `ffnscope.sparse.certificate`; for perplexity learn_then_test is the usual one.
        failure: of split_conformal and learn_then_test.
        test: p-value of learn_then_test; "bootstrap" is sharper, right for many documents only.
    """

    method: Method = "risk_control"
    failure: float = 0.1
    test: Literal["hoeffding_bentkus", "bootstrap"] = "hoeffding_bentkus"

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise unknown_name("method of a certificate", self.method, get_args(Method))
        if self.test not in ("hoeffding_bentkus", "bootstrap"):
            raise unknown_name("test of a certificate", self.test, ("hoeffding_bentkus", "bootstrap"))
        if not 0 < self.failure < 1:
            raise UsageError(f"failure of a certificate must be in (0, 1); got {self.failure:g}.")

    @property
    def p_value(self) -> PValue:
        """The function of that name."""
        return bootstrap if self.test == "bootstrap" else hoeffding_bentkus


@dataclass(frozen=True, slots=True)
class CardOptions:
    """How a card is fitted.

    Attributes:
        wanted: channels that recall is about.
        certify: None meets the target on the calibration documents.
        allocation: "uniform", the same density (or recall, ...) in every FFN; or by damage curves, "relative_error",
            "fisher" (error weighted with the squared gradient of the loss) or "measured" (loss with that FFN alone
            sparse), which is only used where it lowers the loss on the calibration's windows beyond its interval.
        floor: lowest density of the first and the last layer in such an allocation.
        densities: settings that are tried where one density is searched for, from high to low; None takes `DENSITIES`
            for a certificate or an allocation, else `FINE_DENSITIES`.
        gradient_windows: that "fisher" runs a backward on, and "measured" its forwards.
        batch_size: windows per forward.
        checkpoint: folder of a file per FFN: a call that was cut off, or has another way to choose, goes on from them;
            so does the training of a predictor, from its last epoch.
        on_epoch: called after each epoch of a predictor that is trained; see `OnSiteEpoch`.
    """

    wanted: WantedChannels = field(default_factory=WantedChannels)
    certify: Certify | None = None
    allocation: Allocation = "uniform"
    floor: float = 0.3
    densities: tuple[float, ...] | None = None
    gradient_windows: int = 8
    batch_size: int = 4
    checkpoint: Path | None = None
    on_epoch: OnSiteEpoch | None = None

    def __post_init__(self) -> None:
        if self.allocation not in get_args(Allocation):
            raise unknown_name("allocation", self.allocation, get_args(Allocation))
        given = DENSITIES if self.densities is None else self.densities
        falling = all(a > b for a, b in itertools.pairwise(given))
        if not given or not falling or not 0 < given[-1] <= given[0] < 1:
            raise UsageError(f"densities must fall and be in (0, 1), such as 0.9, 0.8, ...; got {given}.")
        if not 0 <= self.floor <= 1:
            raise UsageError(f"floor must be a density in [0, 1]; got {self.floor:g}.")
        for name in ("gradient_windows", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1; got {getattr(self, name)}.")

    @property
    def settings(self) -> tuple[float, ...]:
        """The densities that are tried."""
        if self.densities is not None:
            return self.densities
        return FINE_DENSITIES if self.certify is None and self.allocation == "uniform" else DENSITIES


@dataclass(frozen=True, slots=True, eq=False)
class CardTexts:
    """Texts beside the traces.

    Attributes:
        windows: the text that was traced, which says what to predict; needed for perplexity and for allocations.
        second: traces of another text, to see what the card does there.
        second_windows: another text, to see what the card does to its loss.
    """

    windows: Windows | None = None
    second: Traces | None = None
    second_windows: Windows | None = None


@dataclass(frozen=True, slots=True)
class Ladder:
    """Settings of a selection from safe to aggressive. Before the first of ``values`` comes the dense model.

    Attributes:
        measure: that a setting meets in every FFN; "parameter": settings are those of the policy itself.
        values: of the measure.
        part: documents on which the parameters meet it.
    """

    measure: Measure | Literal["parameter"]
    values: tuple[float, ...]
    part: Part


def ladder_of(target: CardTarget, options: CardOptions) -> Ladder:
    """The settings among which a target is met.

    Raises:
        UsageError: a combination that is not offered.
    """
    if isinstance(target, ParameterTarget):
        check_offered(target, options)
        return Ladder("parameter", (target.value,), "calibrate")
    if options.certify is None and options.allocation == "uniform" and isinstance(target, Target):
        return Ladder(target.measure, (target.value,), "calibrate")
    check_offered(target, options)
    part: Part = "calibrate" if options.certify is None else "fit"
    if isinstance(target, BytesTarget | PerplexityTarget) or target.measure == "relative_error":
        return Ladder("density", options.settings, part)
    if target.measure == "density":
        values = {*options.settings, target.value}
        return Ladder("density", tuple(sorted(values, reverse=True)), part)
    allowed = loss_limit(target)
    losses = [allowed * step for step in LOSS_STEPS if allowed * step < 1]
    return Ladder(target.measure, tuple(1 - x if target.measure == "recall" else x for x in losses), part)


def loss_limit(target: Target | PerplexityTarget) -> float:
    """What a certificate bounds, in [0, 1]."""
    if isinstance(target, PerplexityTarget):
        return 1 / CAP
    return 1 - target.value if target.measure == "recall" else target.value


def check_offered(target: CardTarget, options: CardOptions) -> None:
    """Raise UsageError for a combination that is not offered."""
    if options.certify is not None and options.allocation != "uniform":
        raise UsageError(
            "a certificate needs settings fixed before, which an allocation is not; choose one of the two."
        )
    if isinstance(target, ParameterTarget) and (options.certify is not None or options.allocation != "uniform"):
        raise UsageError(
            "a given parameter of the policy is taken as it is, so nothing can be promised or allocated by it; give "
            "recall, missed_mass, density, relative_error or perplexity."
        )
    measure, _ = measure_and_value(target)
    if options.certify is not None and measure in ("density", "bytes"):
        what = "a density is" if measure == "density" else "a number of bytes is"
        raise UsageError(f"{what} a cost and has no certificate; give recall, missed mass, error or perplexity.")
    if options.allocation != "uniform" and isinstance(target, Target) and target.measure != "density":
        raise UsageError(
            f"a target {target.measure} fixes the density of every FFN, so there is nothing to allocate; give a "
            "density, bytes or a perplexity, or allocation 'uniform'."
        )
