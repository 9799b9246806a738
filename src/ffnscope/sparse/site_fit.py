"""One FFN of a card: its predictor, its parameters at every setting, and what these cost and lose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ffnscope.evaluate.intervals import sums_by_document
from ffnscope.ffn.function import FFN, wide
from ffnscope.io import disposable, expect_kind, read_tensors, write_tensors
from ffnscope.sparse.calibration import Chunks, Scored, Target, calibrate_ladder, calibrate_policy, scored_readings
from ffnscope.sparse.card import WantedChannels
from ffnscope.sparse.card_options import Ladder
from ffnscope.sparse.costs import matrix_bytes, sparse_bytes
from ffnscope.sparse.gradients import OutputGradients, fisher_damage
from ffnscope.sparse.measures import density, missed_mass, recall, relative_error
from ffnscope.sparse.policies import Policy
from ffnscope.sparse.predictors.interface import CHUNK, FitTokens, Predictor
from ffnscope.sparse.readings import Readings, readings_of
from ffnscope.sparse.rule import SelectionRule, tensors_of
from ffnscope.sparse.selector import Selector
from ffnscope.types import FFNSite

KIND = "fitted FFN"
HELD_VALUES = 2**26
"""Scores of a part of the documents that are held in memory; more are made again for each setting."""
HELD_BYTES = 13
"""Bytes of each."""
SiteLoss = Literal["recall", "missed_mass", "relative_error"]


@dataclass(frozen=True, slots=True)
class SiteJob:
    """What is wanted of every FFN.

    Attributes:
        rule: predictor and policy.
        ladder: settings.
        wanted: channels that recall is about.
        loss: that a certificate is about; None where it is not one of FFNs.
        damage: of an allocation; None where none is made of FFNs.
    """

    rule: SelectionRule
    ladder: Ladder
    wanted: WantedChannels
    loss: SiteLoss | None = None
    damage: Literal["relative_error", "fisher"] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SiteTokens:
    """Tokens of one FFN.

    Attributes:
        fit: to make the predictor from, and the settings where these have a certificate.
        calibrate: other documents, to see what settings cost and lose.
        gradients: for the damage "fisher".
        source: the FFN that ``earlier`` of the tokens is the input of; None where there is none.
        params: of the predictor of this FFN alone, beside those of the rule.
    """

    fit: FitTokens
    calibrate: FitTokens
    gradients: OutputGradients | None = None
    source: FFNSite | None = None
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, eq=False)
class FittedSite:
    """One FFN with all settings of a ladder; the first is dense.

    Attributes:
        predictor: of this FFN.
        policy: of this FFN.
        source: the FFN whose input the predictor reads, where it looks ahead; else None.
        parameters: of the policy, one per setting; None = dense.
        density: mean on the calibration documents [n].
        damage: on them [n], or empty.
        loss_sums: sums over the tokens of each of these documents, ascending [n_documents, n], or empty.
        documents: which they are [n_documents].
        loss_counts: their tokens [n_documents].
    """

    predictor: Predictor
    policy: Policy
    source: FFNSite | None
    parameters: tuple[float | None, ...]
    density: Tensor
    damage: Tensor
    loss_sums: Tensor
    documents: Tensor
    loss_counts: Tensor

    def selector(self, setting: int) -> Selector | None:
        """The selection at a setting; None where dense."""
        parameter = self.parameters[setting]
        return None if parameter is None else Selector(self.predictor, self.policy, parameter, self.source)

    @property
    def bytes_dense(self) -> int:
        """Bytes of the dense FFN, in `ffnscope.sparse.costs.UNIT`."""
        return matrix_bytes(self.predictor.ffn)

    def bytes_read(self, setting: int) -> float:
        """Bytes per token at a setting, in the same unit."""
        if self.parameters[setting] is None:
            return self.bytes_dense
        return sparse_bytes(self.predictor, float(self.density[setting]))

    @property
    def break_even(self) -> float:
        """Density above which predictor and kept channels are more bytes than the dense FFN, in [0, 1]."""
        fixed = sparse_bytes(self.predictor, 0.0)
        return min(1.0, max(0.0, (self.bytes_dense - fixed) / (sparse_bytes(self.predictor, 1.0) - fixed)))


def fit_site(ffn: FFN, tokens: SiteTokens, job: SiteJob) -> FittedSite:
    """Make the predictor, calibrate every setting, and measure all of them on the calibration documents.

    Raises:
        UsageError: the one setting of a ladder cannot be met.
    """
    rule = job.rule.own(ahead=tokens.source is not None, params=tokens.params)
    predictor = rule.make_predictor(ffn, replace(tokens.fit, density=_kept_share(ffn, tokens.fit.x, job)))
    policy = rule.make_policy(predictor, tokens.fit)
    readings = readings_of(predictor, tokens.calibrate)
    calibrate = _held(predictor, policy, readings, job)
    chunks = calibrate
    if job.ladder.part == "fit":
        chunks = _held(predictor, policy, readings_of(predictor, tokens.fit), job)
    parameters = (None, *_parameters(_by_keys(policy, job), chunks, job.ladder))
    made = FittedSite(predictor, policy, tokens.source, parameters, *(torch.empty(0) for _ in range(5)))
    return _measured(made, tokens, readings, calibrate, job)


def write_site(path: Path, key: str, fitted: FittedSite) -> None:
    """Write a fitted FFN."""
    measured = {name: getattr(fitted, name) for name in _MEASURED}
    facts = {"kind": KIND, "key": key, "parameters": list(fitted.parameters)}
    write_tensors(path, {**tensors_of(fitted.predictor, fitted.policy), **measured}, facts)


def read_site(path: Path, key: str, ffn: FFN, rule: SelectionRule, source: FFNSite | None = None) -> FittedSite | None:
    """A fitted FFN from its file; None where there is none, or one of other arguments.

    Args: as of `FittedSite`, and the key that it was written with.

    Raises:
        ArtifactError: a damaged file.
    """
    if not path.exists():
        return None
    with disposable("the FFN is fitted again"):
        tensors, facts = read_tensors(path)
        expect_kind(path, facts, KIND)
        if facts.get("key") != key:
            return None
        predictor, policy = rule.own(ahead=source is not None).restore(ffn, tensors)
        measured = {name: tensors[name] for name in _MEASURED}
        return FittedSite(predictor, policy, source, tuple(facts["parameters"]), **measured)


_MEASURED = ("density", "damage", "loss_sums", "documents", "loss_counts")


@torch.no_grad()
def _kept_share(ffn: FFN, x: Tensor, job: SiteJob) -> float | None:
    """The density at which the best selection meets a lone setting, for which a predictor is trained; or None."""
    ladder = job.ladder
    if not job.rule.trained or len(ladder.values) != 1 or ladder.measure not in ("density", "recall", "missed_mass"):
        return None
    (found,) = ladder.values
    if ladder.measure != "density":
        label = job.wanted.label if ladder.measure == "recall" else WantedChannels("top_mass", found).label
        found = sum(float(density(label(ffn.contributions(part))).sum()) for part in x.split(CHUNK)) / len(x)
    return found if 0 < found < 1 else None


def _parameters(policy: Policy, chunks: Chunks, ladder: Ladder) -> Iterator[float | None]:
    """A parameter per setting. What a policy cannot reach is the setting before it, unless it is the only one."""
    if ladder.measure == "parameter":
        for value in ladder.values:
            policy.level(value)  # refuses what is impossible
            yield value
        return
    if len(ladder.values) == 1:
        yield calibrate_policy(policy, chunks, Target(ladder.measure, ladder.values[0])).parameter
        return
    assert ladder.measure != "relative_error", "several settings of it are densities: ladder_of"
    last: float | None = None
    for found in calibrate_ladder(policy, chunks, ladder.measure, ladder.values):
        last = last if found is None else found.parameter
        yield last


@dataclass(frozen=True, slots=True)
class _Keys(Policy):
    """A policy that is given its keys in the place of scores, so that many settings share one computation of them."""

    policy: Policy
    parameter: ClassVar[str] = "that of the policy"

    def keys(self, scores: Tensor) -> Tensor:
        return scores

    def _level(self, parameter: float) -> float:
        return self.policy.level(parameter)

    def _natural(self, level: float) -> float:
        return self.policy.natural(level)


def _by_keys(policy: Policy, job: SiteJob) -> Policy:
    """The policy for what `_held` gives."""
    return _Keys(policy) if len(job.ladder.values) > 1 else policy


def _held(predictor: Predictor, policy: Policy, readings: Readings, job: SiteJob) -> Chunks:
    """The scored tokens, with keys as scores where there are several settings; in memory where they are few."""
    scores = scored_readings(predictor, readings, job.wanted.label)

    def keyed() -> Iterator[Scored]:
        return (Scored(policy.keys(one.scores), one.truth) for one in scores())

    chunks = keyed if len(job.ladder.values) > 1 else scores
    if len(readings) * predictor.ffn.d_ff > HELD_VALUES:
        return chunks
    held: list[Scored] = list(chunks())
    return lambda: held


def _measured(fitted: FittedSite, tokens: SiteTokens, readings: Readings, chunks: Chunks, job: SiteJob) -> FittedSite:
    """Add density, losses by document and damage at every setting."""
    document = readings.document
    documents = document.unique()
    policy, settings = _by_keys(fitted.policy, job), fitted.parameters[1:]
    parts: list[list[dict[str, Tensor]]] = [[] for _ in settings]
    for one in chunks():  # which may be made again whenever they are asked for
        for found, parameter in zip(parts, settings, strict=True):
            found.append(_measures(one, policy, parameter, job))
    densities, losses = [torch.ones(())], [torch.zeros(len(document), dtype=torch.float64)]
    errors: list[float] = [0.0]
    for found in parts:
        rows = {name: torch.cat([row[name] for row in found]) for name in found[0]}
        densities.append(rows["density"].mean())
        losses.append(rows.get("loss", losses[0]))
        errors.append(float(rows["relative_error"].mean()) if "relative_error" in rows else 0.0)
    if job.damage == "fisher":
        errors = _fisher(fitted, tokens.gradients)
    sums, counts = sums_by_document(torch.stack(losses, 1), document, documents)
    damage = torch.tensor(errors if job.damage else [], dtype=torch.float64)
    density_of = torch.stack([value.double() for value in densities])
    found = replace(fitted, density=density_of, damage=damage)
    return replace(found, loss_sums=sums, documents=documents, loss_counts=counts)


def _measures(one: Scored, policy: Policy, parameter: float | None, job: SiteJob) -> dict[str, Tensor]:
    mask = torch.ones_like(one.truth.labels) if parameter is None else policy.select(one.scores, parameter)
    found = {"density": density(mask).cpu()}
    if job.loss is not None:
        found["loss"] = _LOSSES[job.loss](one, mask).clamp(0, 1).cpu()
    if job.damage == "relative_error":
        found["relative_error"] = relative_error(mask, one.truth.h, one.truth.down).cpu()
    return found


_LOSSES: dict[SiteLoss, Callable[[Scored, Tensor], Tensor]] = {
    "recall": lambda one, mask: 1 - recall(mask, one.truth.labels),
    "missed_mass": lambda one, mask: missed_mass(mask, one.truth.contributions),
    "relative_error": lambda one, mask: relative_error(mask, one.truth.h, one.truth.down),
}


def _fisher(fitted: FittedSite, gradients: OutputGradients | None) -> list[float]:
    """The gradient-weighted error at every setting; 0 for an expert that no token of these windows reached."""
    if gradients is None:
        return [0.0] * len(fitted.parameters)
    ffn = fitted.predictor.ffn
    h, down = ffn.h(gradients.x), wide(ffn.weights.down)
    assert fitted.source is None, "refused by SiteJob's maker: gradients come with the FFN's own input alone"
    scores = fitted.predictor(gradients.x)

    def damage(parameter: float | None) -> float:
        if parameter is None:
            return 0.0
        lost = (h * ~fitted.policy.select(scores, parameter)).to(down) @ down.T
        return fisher_damage(lost.cpu(), gradients.dy)

    return [damage(parameter) for parameter in fitted.parameters]
