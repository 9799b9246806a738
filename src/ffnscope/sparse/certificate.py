"""Certificates: the most aggressive of some settings whose loss on a new document is bounded, from a few documents.

Everything here takes losses [n_documents, n_settings], a number in [0, 1] for each document and setting. Settings go
from safe to aggressive and were fixed without these documents; the first is safe by construction (dense, loss 0). The
unit is the document and never the token, since neighbouring tokens depend on each other. All statements are about
documents that could have been drawn in the place of these (exchangeable with them): another domain is not one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ffnscope.errors import NonFiniteError, UsageError

Method = Literal["risk_control", "split_conformal", "learn_then_test"]
PValue = Callable[[Tensor, float], float]
"""Losses [n] of documents, and a limit -> p-value of «the expected loss is above the limit»."""
RESAMPLES = 2000
BOOTSTRAP_DOCUMENTS = 50
"""Fewer are refused: with none that is bad among a few documents the bootstrap believes that there is none at all."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is promised about a new document, and for which setting.

    Attributes:
        method: how it was found.
        limit: risk_control and learn_then_test bound the expected loss by it, split_conformal the loss of a document.
        failure: share of new documents above the limit (split_conformal), chance that the promise is wrong
            (learn_then_test), or 0, where the promise is one about the mean over documents and calibrations.
        setting: index of the most aggressive setting that is certified.
        n_documents: on which it was found.
        loss: mean over these documents with that setting.
    """

    method: Method
    limit: float
    failure: float
    setting: int
    n_documents: int
    loss: float

    @property
    def statement(self) -> str:
        """The promise in words."""
        drawn = f"documents like the {self.n_documents} of the calibration"
        if self.method == "risk_control":
            return f"the expected loss of a new document is at most {self.limit:g}, for {drawn}"
        if self.method == "split_conformal":
            return (
                f"a new document has a loss above {self.limit:g} with a chance of at most {self.failure:g}, for {drawn}"
            )
        return (
            f"the expected loss of a new document is at most {self.limit:g}, but for a chance of {self.failure:g} over "
            f"the choice of the calibration, for {drawn}"
        )


def risk_control(losses: Tensor, limit: float) -> Certificate:
    """Conformal risk control (arXiv:2208.02814): the last setting with n / (n + 1) mean + 1 / (n + 1) <= limit.

    Then the expected loss of a new document is at most the limit, over the draw of the calibration documents as well.
    Losses should rise with the setting; where one falls (errors that cancel), the largest so far counts in its place,
    which keeps the promise.

    Args:
        losses: [n_documents, n_settings] in [0, 1].
        limit: in (0, 1).

    Raises:
        UsageError: impossible losses, or too few documents: below 1 / limit - 1 nothing can be certified.
    """
    n = _check(losses, limit)
    check_documents("risk_control", n, limit)
    rising = losses.double().cummax(dim=1).values
    bound = rising.mean(0) * (n / (n + 1)) + 1 / (n + 1)
    return _certificate("risk_control", losses, (limit, 0.0), _last_before_first_failure(bound <= limit + 1e-12))


def split_conformal(losses: Tensor, limit: float, failure: float) -> Certificate:
    """Split conformal prediction by document: a new document's loss is above the limit with a chance of ``failure``.

    Each document needs a setting: the last one up to which its loss is at most the limit. Of the needed settings, from
    aggressive to safe, the ceil((n + 1)(1 - failure))-th is taken, so that a new document finds it safe enough with a
    chance of 1 - failure at least.

    Args:
        losses: [n_documents, n_settings] in [0, 1].
        limit: in (0, 1).
        failure: in (0, 1).

    Raises:
        UsageError: impossible losses, or too few documents: below 1 / failure - 1 nothing can be certified.
    """
    n = _check(losses, limit)
    check_documents("split_conformal", n, limit, failure)
    safe = losses.double().cummax(dim=1).values <= limit
    needed = safe.sum(1) - 1  # -1 where not even the first is safe
    place = math.ceil((n + 1) * (1 - failure) - 1e-9)
    setting = int(needed.sort(descending=True).values[place - 1])
    return _certificate("split_conformal", losses, (limit, failure), setting)


def learn_then_test(losses: Tensor, limit: float, failure: float, p_value: PValue | None = None) -> Certificate:
    """Learn then Test (arXiv:2110.01052) with fixed-sequence testing, for losses that need not rise with the setting.

    Settings are tested from safe to aggressive, each at the level ``failure``, until one is not rejected. With a chance
    of 1 - failure all that are certified have an expected loss of at most the limit.

    Args:
        losses: [n_documents, n_settings] in [0, 1].
        limit: in (0, 1).
        failure: in (0, 1).
        p_value: `hoeffding_bentkus` (valid for any n) unless another is given, such as `bootstrap` (for large n).

    Raises:
        UsageError: impossible losses, or so few documents that losses of 0 would not be enough.
    """
    n = _check(losses, limit)
    p_value = p_value or hoeffding_bentkus
    check_documents("learn_then_test", n, limit, failure, p_value)
    _check_share("failure", failure)
    passed = torch.tensor([True] + [p_value(row, limit) <= failure for row in losses.T[1:]])
    return _certificate("learn_then_test", losses, (limit, failure), _last_before_first_failure(passed))


def hoeffding_bentkus(losses: Tensor, limit: float) -> float:
    """P-value of «the expected loss is above the limit» from losses [n] in [0, 1]; valid for every n.

    The smaller of exp(-n kl(min(mean, limit), limit)) (Hoeffding) and e P(Binomial(n, limit) <= ceil(n mean)).
    """
    n, mean = len(losses), float(losses.double().mean())
    hoeffding = math.exp(-n * _kl(min(mean, limit), limit))
    bentkus = math.e * binomial_below(math.ceil(n * mean - 1e-9), n, limit)
    return min(1.0, hoeffding, bentkus)


def bootstrap(losses: Tensor, limit: float) -> float:
    """P-value by the bootstrap over documents: share of resampled means, moved to the limit, that are at most the mean.

    Right for many documents only; with few, or with rare large losses, it promises too much.
    """
    values = losses.double().cpu()
    excess = _resamples(len(values)) @ values - values.mean() + limit
    return (1 + int((excess <= values.mean()).sum())) / (1 + RESAMPLES)


@functools.lru_cache(maxsize=4)
def _resamples(n: int) -> Tensor:
    """Weights of n documents in every resampled mean, [RESAMPLES, n]; the same at every call."""
    drawn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(RESAMPLES, n, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts)) / n


def needed_documents(method: Method, limit: float, failure: float = 0.0, p_value: PValue = hoeffding_bentkus) -> int:
    """Documents below which nothing but the dense model can be certified, whatever their losses."""
    _check_share("limit", limit)
    if method != "risk_control":
        _check_share("failure", failure)
    if method == "learn_then_test" and p_value is bootstrap:
        return BOOTSTRAP_DOCUMENTS
    if method == "learn_then_test":  # losses of 0: the Hoeffding part is (1 - limit)^n, and Bentkus's e times that
        return math.ceil(math.log(failure) / math.log1p(-limit) - 1e-9)
    return math.ceil(1 / (limit if method == "risk_control" else failure) - 1 - 1e-9)


def check_documents(
    method: Method, n: int, limit: float, failure: float = 0.0, p_value: PValue = hoeffding_bentkus
) -> None:
    """Raise UsageError where n documents are too few to certify anything, and say how many are needed."""
    needed = needed_documents(method, limit, failure, p_value)
    if n < needed:
        asked = f"{limit:g}" if method == "risk_control" else f"{limit:g} and a failure of {failure:g}"
        cure = "" if method == "risk_control" else " or the failure"
        raise UsageError(
            f"a certificate by {method} with a limit of {asked} needs at least {needed} calibration documents; there "
            f"are {n}. Trace more documents, or raise the limit{cure}."
        )


def binomial_below(k: int, n: int, p: float) -> float:
    """P(Binomial(n, p) <= k)."""
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(min(k, n) + 1)
    ]
    return min(1.0, math.fsum(math.exp(value) for value in logs))


def _kl(a: float, b: float) -> float:
    """Relative entropy of Bernoulli(a) to Bernoulli(b), nats."""
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)


def _check(losses: Tensor, limit: float) -> int:
    _check_share("limit", limit)
    if losses.dim() != 2 or not losses.numel():
        raise UsageError(f"losses must be [n_documents, n_settings], one of each at least; got {tuple(losses.shape)}.")
    if not bool(torch.isfinite(losses).all()):
        raise NonFiniteError("a loss of a document is NaN or infinite, so nothing can be certified.")
    if float(losses.min()) < 0 or float(losses.max()) > 1 + 1e-9:
        found = f"[{float(losses.min()):g}, {float(losses.max()):g}]"
        raise UsageError(f"losses to certify must be in [0, 1]; got {found}. Cap and scale them.")
    return len(losses)


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise UsageError(f"{name} of a certificate must be in (0, 1); got {value:g}.")


def _last_before_first_failure(passed: Tensor) -> int:
    failed = (~passed).nonzero().flatten()
    return (int(failed[0]) if failed.numel() else len(passed)) - 1


def _certificate(method: Method, losses: Tensor, promise: tuple[float, float], setting: int) -> Certificate:
    if setting < 0:
        raise UsageError(
            f"{method} certifies none of the settings, not even the first, whose mean loss is "
            f"{float(losses[:, 0].double().mean()):.4g}; the first must be safe, such as the dense model."
        )
    return Certificate(method, *promise, setting, len(losses), float(losses[:, setting].double().mean()))
