"""Pruners as classes: what they may set, what is refused, and the plan that comes out."""

from __future__ import annotations

import pytest
import torch

from ffnscope.errors import UsageError
from ffnscope.plan.pruners import BasePruner, GlobalPruner, LocalPruner, RankedLayer, plan_by_pruner, row_masks
from ffnscope.types import FFNSite, Scores

A = FFNSite(0, "layers.0.mlp", "gate", "up", "down", 2, 4)
B = FFNSite(1, "layers.1.mlp", "gate", "up", "down", 2, 6)
SCORES = Scores("test", {A: torch.tensor([4.0, 1.0, 3.0, 2.0]), B: torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 0.5])})


def layers():
    return [
        RankedLayer(site.name, value, 2, lambda n=site.d_ff: torch.ones(n, 2)) for site, value in SCORES.values.items()
    ]


def masks(pruner):
    return [m.int().tolist() for m in row_masks(pruner, layers())]


class Matrix(BasePruner):
    """Written as for LLM-Rank: a matrix of scores, and an amount per layer."""

    def extract_scores(self, layer_list):
        for i, layer in enumerate(layer_list):
            assert hasattr(layer, "weight") and not hasattr(layer, "amount")
            layer.pruning_mask = super().scores_to_matrix(layer.importance, layer.in_features)
            layer.amount = i + 1


def test_local_and_global():
    assert masks(LocalPruner(0.5)) == [[1, 0, 1, 0], [1, 1, 1, 0, 0, 0]]
    assert masks(GlobalPruner(0.3)) == [[1, 0, 1, 0], [1, 1, 1, 1, 1, 0]]
    assert masks(LocalPruner(0.0)) == [[1] * 4, [1] * 6]


def test_a_whole_number_is_a_count():
    assert masks(LocalPruner(1)) == [[1, 0, 1, 1], [1, 1, 1, 1, 1, 0]]
    assert masks(GlobalPruner(2)) == [[1, 0, 1, 1], [1, 1, 1, 1, 1, 0]]


def test_a_matrix_and_an_amount_per_layer():
    assert masks(Matrix(0.9)) == [[1, 0, 1, 1], [1, 1, 1, 1, 0, 0]]


def test_absolute_values_of_a_row_are_summed():
    class Signed(BasePruner):
        def extract_scores(self, layer_list):
            for layer in layer_list:
                layer.pruning_mask = torch.stack([layer.importance, -layer.importance], 1)

    assert masks(Signed(0.5)) == masks(LocalPruner(0.5))


@pytest.mark.parametrize("pruner", [LocalPruner, GlobalPruner])
@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (1.5, r"a share of rows in \[0, 1\]; got 1.5"),
        (-0.1, "got -0.1"),
        (99, "a number of rows, 0 to"),
        (-1, "got -1"),
    ],
)
def test_impossible_amounts(pruner, amount, text):
    with pytest.raises(UsageError, match=text):
        masks(pruner(amount))


def test_masks_that_cannot_be():
    class Wrong(BasePruner):
        value = None

        def extract_scores(self, layer_list):
            for layer in layer_list:
                if self.value is not None:
                    layer.pruning_mask = self.value

    pruner = Wrong(0.5)
    with pytest.raises(UsageError, match=r"Wrong.extract_scores set no pruning_mask on layers.0.mlp"):
        masks(pruner)
    pruner.value = torch.ones(3)
    with pytest.raises(
        UsageError, match=r"shape \(3,\) on layers.0.mlp; expected finite values of shape \(4,\) or \(4, 2"
    ):
        masks(pruner)
    pruner.value = torch.tensor([1.0, 2.0, float("nan"), 3.0])
    with pytest.raises(UsageError, match="expected finite values"):
        masks(pruner)
    with pytest.raises(NotImplementedError, match="BasePruner has no extract_scores"):
        masks(BasePruner(0.5))


def plan(pruner, whole=None):
    whole = whole or {}
    found = dict(zip((A, B), row_masks(pruner, layers()), strict=True))
    return plan_by_pruner(SCORES, pruner, {s: m for s, m in found.items() if s not in whole}, whole)


def test_the_plan():
    made = plan(LocalPruner(0.5))
    assert {s: k.tolist() for s, k in made.kept.items()} == {A: [0, 2], B: [0, 1, 2]}
    assert (made.metric, made.allocator, made.budget.sparsity, made.sparsity) == ("test", "LocalPruner", 0.5, 0.5)
    assert plan(LocalPruner(1)).budget.sparsity == pytest.approx(0.2)
    whole = plan(LocalPruner(0.5), {A: torch.arange(4)})
    assert whole.kept[A].tolist() == [0, 1, 2, 3] == whole.protected[A].tolist()


def test_a_plan_keeps_a_channel_of_every_ffn():
    with pytest.raises(
        UsageError, match=r"GlobalPruner with amount 0.5 removes all 4 channels of layers.0.mlp; a plan"
    ):
        plan(GlobalPruner(0.5))
