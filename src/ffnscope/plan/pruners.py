"""Pruners of the LLM-Rank line, as classes: which rows of a list of layers go.

The only place that speaks of ``pruning_mask`` and ``amount``, so that a subclass written for LLM-Rank runs unchanged.
`build_plan` with a `Budget` does the same for channels with exact widths, multiples and floors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from ffnscope.errors import UsageError
from ffnscope.types import Budget, FFNSite, PruningPlan, Scores


class RankedLayer:
    """What a pruner is given in place of a module: a weight whose rows have scores.

    Attributes:
        name: path of the FFN, or of its projection.
        importance: score of every row [out_features], high = keep.
        out_features: number of rows.
        in_features: number of columns.
        pruning_mask: to be set by the pruner: value of every row, [out_features] or [out_features, in_features] (of
            which the absolute values of a row are summed). The rows with the lowest values go.
        amount: may be set by the pruner: rows of this layer to remove, a share in [0, 1] or a whole number. Without
            it, the pruner's own.
    """

    pruning_mask: Tensor
    amount: float | int

    def __init__(self, name: str, importance: Tensor, in_features: int, weight: Callable[[], Tensor]) -> None:
        self.name = name
        self.importance = importance
        self.out_features = importance.numel()
        self.in_features = in_features
        self._weight = weight

    @property
    def weight(self) -> Tensor:
        """The weight [out_features, in_features], read when it is asked for; not to be changed."""
        return self._weight()


class BasePruner:
    """A pruner of your own: write ``extract_scores``, and hand an instance to a pipeline.

    Args:
        amount: rows to remove of a layer that has no ``amount`` of its own: a share in [0, 1] (a float; the product is
            rounded to the nearest whole number, halves to the even one), or a whole number of rows (an int).
    """

    def __init__(self, amount: float | int) -> None:
        self.amount = amount

    def extract_scores(self, layer_list: list[RankedLayer]) -> None:
        """Set ``pruning_mask``, and if wanted ``amount``, on every layer."""
        raise NotImplementedError(f"{type(self).__name__} has no extract_scores(self, layer_list).")

    def scores_to_matrix(self, score_vector: Tensor, expand_dim: int) -> Tensor:
        """Repeat a score per row over ``expand_dim`` columns; [n_rows, expand_dim], a view."""
        return score_vector.unsqueeze(1).expand(-1, expand_dim)


class LocalPruner(BasePruner):
    """Remove the same share of the rows of every layer."""

    def extract_scores(self, layer_list: list[RankedLayer]) -> None:
        """Hand on the scores; the amount is the same everywhere."""
        for layer in layer_list:
            layer.pruning_mask = layer.importance


class GlobalPruner(BasePruner):
    """Rank the rows of all layers together and remove the lowest, wherever they are.

    A share is rounded up over all layers. Of equal scores, those of the first layer and lowest index stay.
    """

    def extract_scores(self, layer_list: list[RankedLayer]) -> None:
        """Hand on the scores, and count how many of the lowest are in each layer."""
        every = torch.cat([layer.importance.double().cpu() for layer in layer_list])
        n_removed = _count(self.amount, every.numel(), type(self).__name__, math.ceil)
        order = torch.sort(every, descending=True, stable=True).indices
        goes = torch.zeros(every.numel(), dtype=torch.bool)
        goes[order[every.numel() - n_removed :]] = True
        parts = goes.split([layer.out_features for layer in layer_list])
        for layer, part in zip(layer_list, parts, strict=True):
            layer.pruning_mask = layer.importance
            layer.amount = int(part.sum())


def row_masks(pruner: BasePruner, layers: Sequence[RankedLayer]) -> list[Tensor]:
    """Ask a pruner which rows stay: boolean masks [out_features], True = keep.

    Of equal values the rows with the lower index stay, so that the result is reproducible.

    Raises:
        UsageError: the pruner set no mask, one that does not fit, or an amount that is no share and no count.
    """
    pruner.extract_scores(list(layers))
    return [_mask(pruner, layer) for layer in layers]


def plan_by_pruner(
    scores: Scores, pruner: BasePruner, masks: Mapping[FFNSite, Tensor], whole: Mapping[FFNSite, Tensor]
) -> PruningPlan:
    """Make the plan of masks that `row_masks` found for channels.

    Args:
        scores: what the pruner was given.
        pruner: names the plan's allocator and budget.
        masks: site -> [d_ff], True = keep.
        whole: sites that are left whole, as experts without calibration tokens -> all their channels.

    Raises:
        UsageError: a site would lose all channels.
    """
    name = type(pruner).__name__
    kept: dict[FFNSite, Tensor] = {}
    for site in scores.values:
        kept[site] = whole[site] if site in whole else masks[site].nonzero().flatten()
        if not kept[site].numel():
            raise UsageError(
                f"{name} with amount {pruner.amount} removes all {site.d_ff} channels of {site.name}; a plan keeps at "
                "least one. Lower the amount, or use build_plan(scores, sparsity, 'global'), which leaves min_width."
            )
    asked = pruner.amount
    if not isinstance(asked, float) or not 0 <= asked < 1:
        total = sum(site.d_ff for site in kept)
        asked = 1 - sum(index.numel() for index in kept.values()) / total
    return PruningPlan(kept, scores.metric, name, Budget(asked), dict(whole), scores.facts)


def _mask(pruner: BasePruner, layer: RankedLayer) -> Tensor:
    name = type(pruner).__name__
    values = getattr(layer, "pruning_mask", None)
    if not isinstance(values, Tensor):
        raise UsageError(f"{name}.extract_scores set no pruning_mask on {layer.name}; set one on every layer.")
    shapes = ((layer.out_features,), (layer.out_features, layer.in_features))
    if tuple(values.shape) not in shapes or not bool(torch.isfinite(values).all()):
        raise UsageError(
            f"{name} set a pruning_mask of shape {tuple(values.shape)} on {layer.name}; expected finite values of "
            f"shape {shapes[0]} or {shapes[1]}."
        )
    rows = values.detach().double().cpu().abs()
    rows = rows.sum(1) if rows.dim() == 2 else rows
    n_removed = _count(getattr(layer, "amount", pruner.amount), layer.out_features, name, round)
    order = torch.sort(rows, descending=True, stable=True).indices
    mask = torch.zeros(layer.out_features, dtype=torch.bool)
    mask[order[: layer.out_features - n_removed]] = True
    return mask


def _count(amount: float | int, n_rows: int, name: str, rounded: Callable[[Fraction], int]) -> int:
    """Rows to remove; a share is taken as the decimal number that it prints as."""
    whole = isinstance(amount, int)
    if not 0 <= amount <= (n_rows if whole else 1):
        expected = f"a number of rows, 0 to {n_rows}" if whole else "a share of rows in [0, 1]"
        raise UsageError(f"{name}: amount must be {expected}; got {amount}.")
    return amount if whole else rounded(Fraction(str(amount)) * n_rows)
