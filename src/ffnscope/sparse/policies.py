"""Policies: which channels of a token are kept, from their scores and one calibrated parameter.

Every policy is a *key* per channel and token, kept where the key is at or above a level. That is what makes them nested
(a lower level keeps all that a higher one keeps) and lets one exact calibration serve all of them
(`ffnscope.sparse.calibration`). The parameter is the level in natural terms: k, a threshold, a share of the mass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ffnscope.errors import NonFiniteError, UsageError
from ffnscope.registry import policy

_LARGEST = torch.finfo(torch.float32).max
_NO_MASS = -2.0  # key of channels without a score, below every share of the mass
_LAST_MASS = 1 - 2**-23  # so that a p below 1 keeps every channel with a score


class Policy:
    """Which channels are kept. Subclasses give `keys`, and `_level` and `_natural` where parameter and level differ."""

    parameter: ClassVar[str]
    """What the parameter is, in words."""

    def keys(self, scores: Tensor) -> Tensor:
        """Scores [T, d_ff] -> keys [T, d_ff] float32: +inf is always kept, -inf never."""
        raise NotImplementedError

    def select(self, scores: Tensor, parameter: float) -> Tensor:
        """Mask [T, d_ff], True = keep, from scores [T, d_ff] (high = keep) and the parameter.

        Raises:
            UsageError: scores of another shape, or an impossible parameter.
            NonFiniteError: a score is NaN or infinite.
        """
        return self.keys(scores) >= torch.tensor(self.level(parameter), dtype=torch.float32, device=scores.device)

    def level(self, parameter: float) -> float:
        """The level of a parameter: channels with keys at or above it are kept."""
        if not math.isfinite(parameter):
            raise UsageError(f"{type(self).__name__}: {self.parameter} must be finite; got {parameter}.")
        return self._level(parameter)

    def natural(self, level: float) -> float:
        """The parameter that keeps what ``level`` keeps."""
        return self._natural(min(max(level, -_LARGEST), _LARGEST))

    def _level(self, parameter: float) -> float:
        return parameter

    def _natural(self, level: float) -> float:
        return level


@policy("top_k", source="arXiv:2310.17157")
@dataclass(frozen=True, slots=True)
class TopK(Policy):
    """The k channels with the highest scores, for every token the same number."""

    parameter: ClassVar[str] = "k, channels per token"

    def keys(self, scores: Tensor) -> Tensor:
        """Minus the rank; of equal scores the first channel is higher."""
        return -ranks(_checked(scores)).float()

    def select(self, scores: Tensor, parameter: float) -> Tensor:
        """The same as by keys, in time proportional to d_ff; see `Policy.select`."""
        k = min(int(-self.level(parameter)), _checked(scores).shape[1])
        if k == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        lowest = scores.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        above, equal = scores > lowest, scores == lowest
        return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))

    def _level(self, parameter: float) -> float:
        return -float(_whole(parameter, self.parameter))

    def _natural(self, level: float) -> float:
        return max(0, math.floor(-level))


@policy("threshold", source="arXiv:2312.12456")
@dataclass(frozen=True, slots=True)
class Threshold(Policy):
    """Channels whose score is at or above one threshold per layer."""

    parameter: ClassVar[str] = "threshold of the score"

    def keys(self, scores: Tensor) -> Tensor:
        """The scores."""
        return _checked(scores).float()


@policy("channel_threshold", source="CHESS (arXiv:2409.01366); the form with E[c] / E[s] is our own")
@dataclass(frozen=True, slots=True, eq=False)
class ChannelThreshold(Policy):
    """Channels whose score is at or above a threshold of their own, t / gain_i.

    Attributes:
        gain: [d_ff], not negative; `channel_gain` makes it from a calibration.
    """

    gain: Tensor
    parameter: ClassVar[str] = "threshold t; that of channel i is t / gain_i"

    def __post_init__(self) -> None:
        if self.gain.dim() != 1 or not bool((torch.isfinite(self.gain) & (self.gain >= 0)).all()):
            raise UsageError(f"gain must be [d_ff], finite and not negative; got shape {tuple(self.gain.shape)}.")

    def keys(self, scores: Tensor) -> Tensor:
        """Scores times gains."""
        if _checked(scores).shape[1] != self.gain.numel():
            raise UsageError(f"{self.gain.numel()} gains were given for scores of {scores.shape[1]} channels.")
        return (scores * self.gain.to(scores.device)).float()

    def thresholds(self, parameter: float) -> Tensor:
        """The threshold of every channel, [d_ff]; infinite where the gain is 0."""
        return parameter / self.gain


def channel_gain(scores: Tensor, contributions: Tensor) -> Tensor:
    """Mean contribution over mean score of every channel, [d_ff]: scores times this are of the size of contributions.

    With |act(g)| as score it is CHESS with E|u| ||W_down|| in the place of its E[u^2]. A channel whose score is
    always 0 has the gain 0.

    Args:
        scores: [T, d_ff].
        contributions: [T, d_ff], of the same tokens.
    """
    mean = scores.double().mean(0)
    return torch.where(mean > 0, contributions.double().mean(0) / mean.clamp_min(1e-300), 0.0)


@policy("nucleus", source="own; called top-p in sampling (arXiv:1904.09751)")
@dataclass(frozen=True, slots=True)
class Nucleus(Policy):
    """The fewest channels that hold the share p of a token's predicted mass (sum of scores); p = 1 keeps all."""

    parameter: ClassVar[str] = "p, share of the predicted mass"

    def keys(self, scores: Tensor) -> Tensor:
        """Minus the share of the mass that is in higher channels."""
        if bool((_checked(scores) < 0).any()):
            raise UsageError("the nucleus policy needs scores that are not negative; use top_k or threshold.")
        ordered, order = scores.double().sort(dim=-1, descending=True, stable=True)
        total = ordered.sum(-1, keepdim=True)
        before = (ordered.cumsum(-1) - ordered) / total.where(total > 0, 1.0)
        key = torch.where(ordered > 0, -before.clamp(0, _LAST_MASS), _NO_MASS).float()
        return torch.empty_like(key).scatter_(-1, order, key)

    def _level(self, parameter: float) -> float:
        if not 0 <= parameter <= 1:
            raise UsageError(f"p must be in [0, 1], the share of the predicted mass to keep; got {parameter:g}.")
        return _NO_MASS if parameter == 1 else _next(-parameter, math.inf)

    def _natural(self, level: float) -> float:
        return 1.0 if level <= _NO_MASS else min(max(-_next(level, -math.inf), 0.0), _next(1.0, 0.0))


@policy("capped_threshold", source="own")
@dataclass(frozen=True, slots=True)
class CappedThreshold(Policy):
    """Channels whose score is at or above a threshold, but no fewer than k_min and no more than k_max per token.

    Attributes:
        k_min: channels that every token keeps at least.
        k_max: channels that a token keeps at most.
    """

    k_min: int
    k_max: int
    parameter: ClassVar[str] = "threshold of the score"

    def __post_init__(self) -> None:
        if not 0 <= self.k_min <= self.k_max:
            raise UsageError(f"k_min and k_max must be 0 <= k_min <= k_max; got {self.k_min} and {self.k_max}.")

    def keys(self, scores: Tensor) -> Tensor:
        """The scores; of the k_min highest +inf, of those below the k_max highest -inf."""
        rank, key = ranks(_checked(scores)), scores.float()
        key = key.masked_fill(rank <= self.k_min, math.inf)
        return key.masked_fill(rank > self.k_max, -math.inf)


@policy("statistical_top_k", source="Spark Transformer (arXiv:2506.06644)")
@dataclass(frozen=True, slots=True)
class StatisticalTopK(Policy):
    """Channels whose score is z standard deviations of the token's scores or more above their mean."""

    parameter: ClassVar[str] = "z, standard deviations above the mean"

    def keys(self, scores: Tensor) -> Tensor:
        """How many standard deviations a score is above the mean of its token."""
        value = _checked(scores).double()
        spread = value.std(-1, keepdim=True, correction=0)
        return ((value - value.mean(-1, keepdim=True)) / spread.where(spread > 0, 1.0)).float()


@policy("bank_top_k", source="arXiv:2606.10722")
@dataclass(frozen=True, slots=True)
class BankTopK(Policy):
    """The k channels with the highest scores of every bank of consecutive channels; the last bank may be smaller.

    Attributes:
        size: channels per bank.
    """

    size: int = 64
    parameter: ClassVar[str] = "k, channels per bank and token"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"size must be at least 1 channel per bank; got {self.size}.")

    def keys(self, scores: Tensor) -> Tensor:
        """Minus the rank within the bank."""
        found = [ranks(bank) for bank in _checked(scores).split(self.size, dim=-1)]
        return -torch.cat(found, -1).float()

    def _level(self, parameter: float) -> float:
        return -float(_whole(parameter, self.parameter))

    def _natural(self, level: float) -> float:
        return max(0, math.floor(-level))


@policy("hybrid", source="own")
@dataclass(frozen=True, slots=True, eq=False)
class Hybrid(Policy):
    """A supernode core that is always kept, and of the other channels what another policy keeps.

    Attributes:
        core: indices of channels, int64.
        rest: policy for the others, which sees only their scores; the parameter is its.
    """

    core: Tensor
    rest: Policy
    parameter: ClassVar[str] = "that of the other policy"

    def __post_init__(self) -> None:
        if self.core.dtype != torch.int64 or self.core.dim() != 1 or self.core.unique().numel() != self.core.numel():
            raise UsageError(f"core must hold distinct channels as int64 [k]; got {self.core.dtype}.")

    def keys(self, scores: Tensor) -> Tensor:
        """+inf for the core, the keys of the other policy for the rest."""
        d_ff = _checked(scores).shape[1]
        if self.core.numel() and not 0 <= int(self.core.min()) <= int(self.core.max()) < d_ff:
            raise UsageError(f"core must be channels in [0, {d_ff}); got up to {int(self.core.max())}.")
        core = self.core.to(scores.device)
        others = torch.ones(d_ff, dtype=torch.bool, device=scores.device).index_fill_(0, core, False)
        key = torch.full(scores.shape, math.inf, device=scores.device)
        if bool(others.any()):
            key[:, others] = self.rest.keys(scores[:, others])
        return key

    def _level(self, parameter: float) -> float:
        return self.rest.level(parameter)

    def _natural(self, level: float) -> float:
        return self.rest.natural(level)


def ranks(scores: Tensor) -> Tensor:
    """Rank of every channel within its token, [T, d_ff] int64 from 1 = highest; of equals the first is higher."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(1, scores.shape[-1] + 1, device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _checked(scores: Tensor) -> Tensor:
    if scores.dim() != 2 or not scores.is_floating_point():
        raise UsageError(f"scores must be floating [T, d_ff]; got {scores.dtype} {tuple(scores.shape)}.")
    if not bool(torch.isfinite(scores).all()):
        raise NonFiniteError("a score is NaN or infinite; a predictor must give finite scores.")
    return scores


def _whole(parameter: float, what: str) -> int:
    if parameter != int(parameter) or parameter < 0:
        raise UsageError(f"{what}: must be a whole number of at least 0; got {parameter:g}.")
    return int(parameter)


def _next(value: float, towards: float) -> float:
    """The next float32."""
    return float(torch.nextafter(torch.tensor(value, dtype=torch.float32), torch.tensor(towards)))
