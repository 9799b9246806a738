"""What a selection of channels costs and loses, per token, and summed up over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.ffn.function import FFN, wide

MEASURES = ("density", "recall", "precision", "missed_mass", "relative_error")
"""Names of what is measured for every token."""


def density(mask: Tensor) -> Tensor:
    """Share of the channels that are kept, [T]."""
    return mask.double().mean(-1)


def recall(mask: Tensor, labels: Tensor) -> Tensor:
    """Share of the wanted channels that are kept, [T]; 1 where none is wanted."""
    return _share((mask & labels).sum(-1), labels.sum(-1), 1.0)


def precision(mask: Tensor, labels: Tensor) -> Tensor:
    """Share of the kept channels that are wanted, [T]; 1 where none is kept."""
    return _share((mask & labels).sum(-1), mask.sum(-1), 1.0)


def missed_mass(mask: Tensor, contributions: Tensor) -> Tensor:
    """Share of the contributions that is in channels not kept, [T]; 0 where nothing contributes."""
    mass = contributions.double()
    return _share((mass * ~mask).sum(-1), mass.sum(-1), 0.0)


def relative_error(mask: Tensor, h: Tensor, down: Tensor) -> Tensor:
    """||W_down (h without the kept channels)|| / ||W_down h||, [T]; 0 where the output is 0 (CETT, arXiv:2402.03804).

    The bias of down is in neither, since it is never left out.

    Args:
        mask: [T, d_ff].
        h: channel activations [T, d_ff].
        down: [d_model, d_ff].
    """
    weight = wide(down).to(h.dtype)
    lost, whole = ((part @ weight.T).double().norm(dim=-1) for part in (h * ~mask, h))
    return _share(lost, whole, 0.0)


@dataclass(frozen=True, slots=True)
class Summary:
    """A measure over tokens: mean, and the values that 5 % and 95 % of the tokens are at or below."""

    mean: float
    p5: float
    p95: float


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """What the dense FFN does with some tokens.

    Attributes:
        h: channel activations [T, d_ff].
        contributions: c [T, d_ff].
        labels: the channels that should be kept, mask [T, d_ff].
        down: [d_model, d_ff].
    """

    h: Tensor
    contributions: Tensor
    labels: Tensor
    down: Tensor


Label = Callable[[Tensor], Tensor]
"""Contributions [T, d_ff] -> mask of the channels that should be kept."""


def truths(ffn: FFN, x: Tensor, label: Label, chunk: int = 1024) -> Iterator[tuple[Tensor, Truth]]:
    """Yield inputs [n, d_model] and what the dense FFN does with them, ``chunk`` tokens at a time."""
    norms = ffn.down_norms
    for part in x.split(chunk):
        yield part, truth_of(ffn, part, label, norms)


def truth_of(ffn: FFN, x: Tensor, label: Label, norms: Tensor | None = None) -> Truth:
    """What the dense FFN does with inputs [n, d_model]; ``norms`` are its `down_norms`, where they are known."""
    h = ffn.h(x)
    c = h.abs() * (ffn.down_norms if norms is None else norms)
    return Truth(h, c, label(c), ffn.weights.down)


@dataclass(frozen=True, slots=True, eq=False)
class TokenMeasures:
    """Each of `MEASURES`, and perhaps of `ffnscope.sparse.gap.GAPS`, for every token: name -> [T] float64."""

    values: dict[str, Tensor]

    def summary(self) -> dict[str, Summary]:
        """Mean, p5 and p95 over tokens."""
        return {name: summarise(value) for name, value in self.values.items()}

    def by_document(self, document: Tensor) -> dict[str, Tensor]:
        """Means over the tokens of each document, [n_documents] in ascending order of the document [T] of a token."""
        _, place, sizes = document.unique(return_inverse=True, return_counts=True)
        return {
            name: torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, place, value) / sizes
            for name, value in self.values.items()
        }


Select = Callable[[Tensor], Tensor]
"""Inputs x [T, d_model] -> mask [T, d_ff]."""


def measure(ffn: FFN, select: Select, x: Tensor, label: Label, chunk: int = 1024) -> TokenMeasures:
    """Measure a selection on tokens against the dense FFN.

    Args:
        ffn: the dense FFN.
        select: a predictor with a policy, or anything else that makes masks.
        x: inputs [T, d_model].
        label: what should be kept (`ffnscope.sparse.labels`).
        chunk: tokens at a time; changes memory, not results.

    Raises:
        UsageError: no token.
    """
    if not len(x):
        raise UsageError("there is no token to measure on; give at least one.")
    rows = [of_mask(select(part), truth) for part, truth in truths(ffn, x, label, chunk)]
    return TokenMeasures({name: torch.cat([row[name] for row in rows]) for name in MEASURES})


def of_mask(mask: Tensor, truth: Truth, names: Sequence[str] = MEASURES) -> dict[str, Tensor]:
    """Some measures of a mask [T, d_ff] on some tokens, name -> [T]."""
    return {name: _OF[name](mask, truth).cpu() for name in names}


def summarise(values: Tensor) -> Summary:
    """Mean, p5 and p95 of values [T]; the last two are values that occur."""
    ordered = values.double().sort().values
    at = [ordered[math.ceil(share * len(ordered)) - 1] for share in (0.05, 0.95)]
    return Summary(float(ordered.mean()), float(at[0]), float(at[1]))


def _share(part: Tensor, whole: Tensor, empty: float) -> Tensor:
    """part / whole in float64, and ``empty`` where the whole is 0."""
    divisor = whole.double()
    return torch.where(divisor > 0, part.double() / divisor.where(divisor > 0, 1.0), empty)


_OF: dict[str, Callable[[Tensor, Truth], Tensor]] = {
    "density": lambda mask, truth: density(mask),
    "recall": lambda mask, truth: recall(mask, truth.labels),
    "precision": lambda mask, truth: precision(mask, truth.labels),
    "missed_mass": lambda mask, truth: missed_mass(mask, truth.contributions),
    "relative_error": lambda mask, truth: relative_error(mask, truth.h, truth.down),
}
