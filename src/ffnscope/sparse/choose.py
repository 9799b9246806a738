"""Which setting every FFN of a card gets: by the target itself, a certificate, the perplexity, or an allocation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.calibrate.windows import Windows
from ffnscope.errors import UsageError
from ffnscope.sparse.allocation import DamageCurve, allocate
from ffnscope.sparse.calibration import Target
from ffnscope.sparse.card import LossChange
from ffnscope.sparse.card_options import (
    CAP,
    BytesTarget,
    CardOptions,
    CardTarget,
    Certify,
    Ladder,
    ParameterTarget,
    PerplexityTarget,
    loss_limit,
    measure_and_value,
)
from ffnscope.sparse.certificate import (
    Certificate,
    check_documents,
    learn_then_test,
    needed_documents,
    risk_control,
    split_conformal,
)
from ffnscope.sparse.evaluation import OnBatch, after_prompt, form_losses
from ffnscope.sparse.forms import MaskedForm
from ffnscope.sparse.losses import document_sums, loss_change
from ffnscope.sparse.selector import Selector
from ffnscope.sparse.site_fit import FittedSite
from ffnscope.types import FFNSite

Fitted = Mapping[FFNSite, FittedSite]
Z = 1.96
NEEDS_WINDOWS = (
    "perplexity targets and allocations need the text itself: give CardTexts(windows=...), as it was traced."
)


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A setting per FFN, and why.

    Attributes:
        settings: site -> index of a setting, 0 = dense.
        certificate: or None.
        allocation: facts of it.
    """

    settings: Mapping[FFNSite, int]
    certificate: Certificate | None = None
    allocation: Mapping[str, Any] = field(default_factory=lambda: {"used": "uniform"})


class ModelLosses:
    """NLL of the windows of one part of the documents, dense and at settings; each is measured once.

    ``prompt`` tokens at the beginning of each window run dense and do not count (`form_losses`). ``on_batch`` is called
    after each batch that is run, with (batches done, batches in all) of the measurement.
    """

    def __init__(
        self,
        model: nn.Module,
        fitted: Fitted,
        windows: Windows,
        batch_size: int,
        on_batch: OnBatch | None = None,
        prompt: int = 0,
    ):
        self.model, self.fitted, self.batch_size = model, fitted, batch_size
        self.windows, self._whole = after_prompt(windows, prompt), windows
        self.on_batch, self.prompt = on_batch, prompt
        self._known: dict[tuple[int, ...], Tensor] = {}

    def at(self, settings: Mapping[FFNSite, int]) -> Tensor:
        """Summed NLL of every window [n]."""
        key = tuple(settings.get(site, 0) for site in self.fitted)
        if key not in self._known:
            chosen = selectors_at(self.fitted, settings)
            form = MaskedForm("card", chosen) if chosen else None
            options: Any = {"prompt": self.prompt, "batch_size": self.batch_size, "on_batch": self.on_batch}
            self._known[key] = form_losses(self.model, form, self._whole, **options).nll
        return self._known[key]

    def change(self, settings: Mapping[FFNSite, int]) -> LossChange:
        """What settings do to the loss."""
        return loss_change(self.at({}), self.at(settings), self.windows)

    def rise(self, settings: Mapping[FFNSite, int]) -> float:
        """Mean NLL per token over the dense model's."""
        return float((self.at(settings) - self.at({})).sum()) / self.windows.n_targets

    def rise_by_document(self, settings: Mapping[FFNSite, int]) -> Tensor:
        """The same of every document [n_documents]."""
        sums, counts = document_sums(self.at(settings) - self.at({}), self.windows)
        return sums[counts > 0] / counts[counts > 0]


def selectors_at(fitted: Fitted, settings: Mapping[FFNSite, int]) -> dict[FFNSite, Selector]:
    """The selections of FFNs that are not dense at these settings."""
    found = {site: one.selector(settings.get(site, 0)) for site, one in fitted.items()}
    return {site: selector for site, selector in found.items() if selector is not None}


def choose(
    fitted: Fitted, ladder: Ladder, target: CardTarget, options: CardOptions, losses: ModelLosses | None
) -> Choice:
    """Choose a setting for every FFN.

    Args:
        fitted: FFNs with all settings.
        ladder: the settings.
        target: what is wanted.
        options: certificate and allocation.
        losses: on the windows of the calibration documents; needed for perplexity, and for allocations.

    Raises:
        UsageError: too few documents for a certificate, or a target that no setting meets.
    """
    if options.certify is not None:
        found = _certified(fitted, ladder, target, options.certify, losses)
        return Choice(_same(fitted, found.setting), found)
    uniform = 1
    if isinstance(target, PerplexityTarget):
        uniform = _bisect(fitted, len(ladder.values), target, _needed(losses))
    elif isinstance(target, BytesTarget):
        uniform = _within_bytes(fitted, target.share)
    elif options.allocation != "uniform":
        uniform = 1 + ladder.values.index(measure_and_value(target)[1])
    if options.allocation == "uniform" or uniform == 0:
        return Choice(_same(fitted, uniform))
    return _allocated(fitted, uniform, options, _needed(losses))


def most_batches(n_sites: int, ladder: Ladder, target: CardTarget, options: CardOptions, n_windows: int) -> int:
    """Batches that `choose` runs forward at most; 0 where no loss of the model decides."""
    each, few = (math.ceil(n / options.batch_size) for n in (n_windows, min(n_windows, options.gradient_windows)))
    n, of_model = len(ladder.values), isinstance(target, PerplexityTarget)
    if options.certify is not None:
        return each * (1 + n) if of_model else 0
    found = each * (1 + math.ceil(math.log2(n + 1))) if of_model else 0
    if options.allocation != "uniform":
        found += each * (2 if of_model else 3)
    return found + few * (1 + n_sites * n) * (options.allocation == "measured")


def check_certificate(certify: Certify, target: CardTarget, n_documents: int) -> None:
    """Raise UsageError before any work where the calibration has too few documents for what is to be promised."""
    assert not isinstance(target, ParameterTarget | BytesTarget), "check_offered refuses it"
    limit = loss_limit(target)
    if not 0 < limit < 1:
        raise UsageError(f"a target with the loss {limit:g} cannot be promised; allow a loss in (0, 1).")
    if isinstance(target, PerplexityTarget):  # whose limit nobody has asked for
        needed = needed_documents(certify.method, limit, certify.failure, certify.p_value)
        if n_documents < needed:
            raise UsageError(
                f"a certificate of the perplexity by {certify.method} with a failure of {certify.failure:g} needs at "
                f"least {needed} calibration documents; there are {n_documents}. Trace more documents, or raise the "
                "failure."
            )
    check_documents(certify.method, n_documents, limit, certify.failure, certify.p_value)


def _certified(
    fitted: Fitted, ladder: Ladder, target: CardTarget, certify: Certify, losses: ModelLosses | None
) -> Certificate:
    assert not isinstance(target, ParameterTarget | BytesTarget), "check_offered refuses it"
    limit = loss_limit(target)
    if isinstance(target, Target):
        return _certificate(_document_losses(fitted), limit, certify)
    model = _needed(losses)
    columns: list[Tensor] = [torch.zeros_like(model.rise_by_document({}))]
    found = _certificate(columns[0][:, None], limit, certify)
    for setting in range(1, len(ladder.values) + 1):  # from safe to aggressive, so the first failure ends it
        rise = model.rise_by_document(_same(fitted, setting))
        columns.append((rise / (CAP * target.nats)).clamp(0, 1))
        found = _certificate(torch.stack(columns, 1), limit, certify)
        if found.setting < setting:
            break
    return found


def _certificate(losses: Tensor, limit: float, certify: Certify) -> Certificate:
    if certify.method == "risk_control":
        return risk_control(losses, limit)
    if certify.method == "split_conformal":
        return split_conformal(losses, limit, certify.failure)
    return learn_then_test(losses, limit, certify.failure, certify.p_value)


def _document_losses(fitted: Fitted) -> Tensor:
    """Mean loss of each document over its tokens in all FFNs [n_documents, n_settings]."""
    documents = torch.cat([one.documents for one in fitted.values()]).unique()
    sums = torch.zeros(len(documents), next(iter(fitted.values())).loss_sums.shape[1], dtype=torch.float64)
    counts = torch.zeros(len(documents), dtype=torch.float64)
    for one in fitted.values():
        place = torch.searchsorted(documents, one.documents)
        sums.index_add_(0, place, one.loss_sums)
        counts.index_add_(0, place, one.loss_counts)
    return (sums / counts[:, None]).clamp(0, 1)


def _bisect(fitted: Fitted, n_settings: int, target: PerplexityTarget, losses: ModelLosses) -> int:
    """The most aggressive setting, the same in all FFNs, that was measured to be within the target; 0 is dense."""
    low, high = 0, n_settings + 1
    while high - low > 1:
        middle = (low + high) // 2
        within = losses.rise(_same(fitted, middle)) <= target.nats
        low, high = (middle, high) if within else (low, middle)
    return low


def _within_bytes(fitted: Fitted, share: float) -> int:
    """The safest setting, the same in all FFNs, that reads no more than a share of the dense bytes."""
    dense = sum(one.bytes_dense for one in fitted.values())
    n_settings = len(next(iter(fitted.values())).parameters)
    read = [sum(min(one.bytes_read(i), one.bytes_dense) for one in fitted.values()) for i in range(n_settings)]
    found = next((i for i, one in enumerate(read) if one <= share * dense * (1 + 1e-12)), None)
    if found is None:
        raise UsageError(
            f"the lowest density reads {min(read) / dense:.1%} of the dense bytes, predictors included, above the "
            f"budget of {share:.1%}. Raise the budget, or choose a predictor that reads less."
        )
    return found


def _allocated(fitted: Fitted, uniform: int, options: CardOptions, losses: ModelLosses) -> Choice:
    """Allocate the bytes of a uniform setting, and keep that where the loss is not lower beyond its interval."""
    same = _same(fitted, uniform)
    budget = sum(one.bytes_read(uniform) for one in fitted.values())
    floors = _floors(list(fitted), options.floor)
    windows = spread(losses.windows, options.gradient_windows)
    few = ModelLosses(losses.model, fitted, windows, losses.batch_size, losses.on_batch, losses.prompt)
    curves = {site: _curve(fitted, site, options, few) for site in fitted}
    settings = allocate(curves, budget, floors)
    change = loss_change(losses.at(same), losses.at(settings), losses.windows)
    accepted = change.stderr is not None and change.difference + Z * change.stderr < 0
    facts: dict[str, Any] = {
        "asked": options.allocation,
        "used": options.allocation if accepted else "uniform",
        "budget_bytes": budget,
        "loss_difference": change.difference,
        "stderr": change.stderr,
        "uniform_perplexity": change.dense,
        "allocated_perplexity": change.sparse,
        "densities": {site.name: float(fitted[site].density[at]) for site, at in settings.items()},
    }
    return Choice(settings if accepted else same, None, facts)


def spread(windows: Windows, n: int) -> Windows:
    """``n`` windows, evenly spread over a text; all where there are no more."""
    return windows if n >= len(windows) else windows[torch.arange(n) * len(windows) // n]


def _curve(fitted: Fitted, site: FFNSite, options: CardOptions, losses: ModelLosses) -> DamageCurve:
    one = fitted[site]
    damage = one.damage
    if options.allocation == "measured":
        damage = torch.tensor([losses.rise({site: i}) for i in range(len(one.parameters))], dtype=torch.float64)
    cost = torch.tensor([one.bytes_read(i) for i in range(len(one.parameters))], dtype=torch.float64)
    return DamageCurve(cost, damage, one.density)


def _floors(sites: Sequence[FFNSite], floor: float) -> dict[FFNSite, float]:
    ends = {min(site.layer for site in sites), max(site.layer for site in sites)}
    return {site: floor for site in sites if site.layer in ends}


def _same(fitted: Fitted, setting: int) -> dict[FFNSite, int]:
    return dict.fromkeys(fitted, setting)


def _needed(losses: ModelLosses | None) -> ModelLosses:
    if losses is None:
        raise UsageError(NEEDS_WINDOWS)
    return losses
