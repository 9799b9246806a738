"""What has to hold within the contextual block, and between it and the texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ffnscope.errors import UsageError
from ffnscope.run.document import KeyPath
from ffnscope.run.finding import Finding, finding
from ffnscope.run.schema import RunConfig
from ffnscope.sparse.card_curve import check_densities
from ffnscope.sparse.card_options import check_offered
from ffnscope.sparse.rivals import USUAL, check_rivals
from ffnscope.sparse.rule import rule_of

BLOCK = "contextual"


def contextual_findings(config: RunConfig) -> Iterator[Finding]:
    """Yield every problem of the block; keys of one that is not enabled would do nothing."""
    asked = config.contextual
    if not asked.enabled:
        for key, one in type(asked).model_fields.items():
            if getattr(asked, key) != one.get_default(call_default_factory=True):
                yield finding((BLOCK, key), "would do nothing without 'enabled: true'", (BLOCK, "enabled"))
        return
    rules = list(_rule(config))
    yield from rules
    yield from _promise(config)
    yield from _second(config)
    if asked.against != USUAL and not asked.curves:
        yield finding((BLOCK, "against"), "would do nothing without contextual.curves", (BLOCK, "curves"))
    if not rules:
        needs = [(BLOCK, key) for key in ("predictor", "predictor_params", "policy", "policy_params")]
        yield from _tried((BLOCK, "curves"), lambda: check_densities(asked.rule, asked.curves), *needs)
        yield from _tried(
            (BLOCK, "against"), lambda: check_rivals(asked.against, asked.curves, prompt=asked.rule.prompt), *needs
        )


def _rule(config: RunConfig) -> Iterator[Finding]:
    """Predictor and policy each by itself, so that both are told."""
    asked = config.contextual
    own = (BLOCK, "predictor_params") if asked.predictor_params else (BLOCK, "predictor")
    yield from _tried(own, lambda: rule_of(asked.predictor, "top_k", asked.predictor_params, {}), (BLOCK, "predictor"))
    own = (BLOCK, "policy_params") if asked.policy_params else (BLOCK, "policy")
    yield from _tried(own, lambda: rule_of("oracle", asked.policy, {}, asked.policy_params), (BLOCK, "policy"))


def _promise(config: RunConfig) -> Iterator[Finding]:
    asked = config.contextual
    if asked.failure is not None and asked.certify in (None, "risk_control"):
        message = f"would do nothing with 'certify: {asked.certify or 'null'}'. Leave it out"
        yield finding((BLOCK, "failure"), message, (BLOCK, "certify"))
    if asked.floor is not None and asked.allocation == "uniform":
        message = "would do nothing with 'allocation: uniform'. Leave it out"
        yield finding((BLOCK, "floor"), message, (BLOCK, "allocation"))
    options = asked.options(config.calibration.batch_size)
    path = (BLOCK, "allocation") if asked.certify is None else (BLOCK, "certify")
    reads = [(BLOCK, key) for key in ("target", "certify", "allocation", "failure")]
    yield from _tried(path, lambda: check_offered(asked.card_target, options), *reads)


def _second(config: RunConfig) -> Iterator[Finding]:
    text, path = config.contextual_text, (BLOCK, "second")
    if text is None:
        return
    reads: tuple[KeyPath, ...] = (("dataset",), ("evaluation",))
    if text.split is None and not text.is_file:
        yield finding(path, f"no held-out split of {text.name!r} is known. Give contextual.second.split", *reads)
    elif text.identity in {config.calibration_text.identity, *(one.identity for one in config.mixed_texts)}:
        message = f"the second text {text.words!r} is the same as that of the calibration. Give another"
        yield finding(path, message, *reads)


def _tried(path: KeyPath, check: Callable[[], object], *reads: KeyPath) -> Iterator[Finding]:
    try:
        check()
    except UsageError as error:
        yield finding(path, str(error).rstrip("."), *reads)
