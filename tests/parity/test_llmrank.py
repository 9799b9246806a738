"""Scores and masks of the public LLM-Rank code (commit aaf9ec9, executed), reproduced by the scorers and pruners.

The numbers are in ``llmrank.json``; what its ``do_not_replicate`` names is asserted to be *different* here.
"""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from ffnscope.metrics.scorers import (
    ActivationScorer,
    Layer,
    ModifiedPageRankScorer,
    NormScorer,
    RandomScorer,
    WandaScorer,
    WeightedPageRankScorer,
    shares_of,
)
from ffnscope.plan.pruners import GlobalPruner, LocalPruner, RankedLayer, row_masks

FACTS = json.loads((Path(__file__).parent / "llmrank.json").read_text(encoding="utf-8"))
CASES = [(case, name) for case in FACTS if isinstance(FACTS[case], dict) for name in FACTS[case].get("scorers", ())]
SCORERS = {
    "norm_p1": NormScorer(1),
    "norm_p2": NormScorer(2),
    "activation": ActivationScorer(),
    "wpr_default_gamma0_theta0.5": WeightedPageRankScorer(0.0, 0.5),
    "wpr_gamma0.9_theta0.5": WeightedPageRankScorer(0.9, 0.5),
    "wpr_gamma0.5_theta0.5": WeightedPageRankScorer(0.5, 0.5),
    "wpr_gamma1_theta1": WeightedPageRankScorer(1.0, 1.0),
    "wpr_gamma1_theta0": WeightedPageRankScorer(1.0, 0.0),
    "wpr_gamma0.5_theta1": WeightedPageRankScorer(0.5, 1.0),
    "mpr_default": ModifiedPageRankScorer(),
    "mpr_z_amount0.3": ModifiedPageRankScorer(z_importance=True, sparsity=0.3),
    "mpr_z_amount0.5": ModifiedPageRankScorer(z_importance=True, sparsity=0.5),
    "wanda": WandaScorer(),
    "random_torch_manual_seed_0": RandomScorer(seed=0),
}
PRUNERS = {"local": LocalPruner, "global": GlobalPruner}


def layers_of(case, dtype=torch.float32):
    rows = FACTS[case]["layers"]
    names = ("weight", "in_activation", "out_activation")
    return [Layer(*(torch.tensor(row[name], dtype=dtype) for name in names)) for row in rows]


def sweep(scorer, layers):
    """Importance that each layer is given, and what it gets: normalised, layer after layer."""
    scorer.begin()
    given, found = [shares_of(layers[0].in_activation)], []
    for layer in layers:
        found.append(shares_of(scorer.apply(given[-1], layer)))
        given.append(found[-1])
    return given[:-1], found


def ranked(case, importance):
    rows = FACTS[case]["layers"]
    weights = [torch.tensor(row["weight"], dtype=torch.float32) for row in rows]
    return [
        RankedLayer(row["name"], scores, weight.shape[1], lambda w=weight: w)
        for row, scores, weight in zip(rows, importance, weights, strict=True)
    ]


@pytest.mark.parametrize(("case", "name"), CASES)
def test_every_score_vector(case, name):
    expected = FACTS[case]["scorers"][name]
    given, found = sweep(SCORERS[name], layers_of(case))
    for mine, theirs in zip(found, expected["importance_per_layer"], strict=True):
        assert mine.tolist() == pytest.approx(theirs, abs=1e-6)
    passed_in = expected.get("prev_importance_per_layer") or [mine.tolist() for mine in given]  # random lists none
    for mine, theirs in zip(given, passed_in, strict=True):
        assert mine.tolist() == pytest.approx(theirs, abs=1e-6)


def test_there_are_127_deterministic_score_vectors():
    counted = [FACTS[case]["scorers"][name]["importance_per_layer"] for case, name in CASES if "random" not in name]
    assert sum(map(len, counted)) == 127


MASKS = [
    (case, name, key)
    for case, name in CASES
    for key in FACTS[case]["scorers"][name]
    if key.endswith("keep_rows") and not FACTS[case]["scorers"][name]["tie_at_cut"][key]
]


@pytest.mark.parametrize(("case", "name", "key"), MASKS)
def test_every_untied_mask(case, name, key):
    kind, amount = re.fullmatch(r"(local|global)_amount([\d.]+)_keep_rows", key).groups()
    _, importance = sweep(SCORERS[name], layers_of(case))
    found = row_masks(PRUNERS[kind](float(amount)), ranked(case, importance))
    assert [mask.int().tolist() for mask in found] == FACTS[case]["scorers"][name][key]


def test_untied_masks_are_most_of_them():
    every = [flag for case, name in CASES for flag in FACTS[case]["scorers"][name].get("tie_at_cut", {}).values()]
    assert len(MASKS) == every.count(False) > every.count(True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [n for n in SCORERS if "random" not in n])
def test_every_type_of_weight(name, dtype):
    """The public code fails in half precision; these weights are exact in every type."""
    _, found = sweep(SCORERS[name], layers_of("chained_four_layer", dtype))
    expected = FACTS["chained_four_layer"]["scorers"][name]["importance_per_layer"]
    assert all(mine.tolist() == pytest.approx(e, abs=1e-6) for mine, e in zip(found, expected, strict=True))


def one_layer(scores):
    return RankedLayer("one", torch.tensor(scores), 1, lambda: torch.zeros(len(scores), 1))


@pytest.mark.parametrize("row", FACTS["rounding"], ids=lambda r: f"{r['n']}-{r['amount']}")
def test_counts(row):
    n, amount = row["n"], row["amount"]
    removed = {k: int((~row_masks(p(amount), [one_layer([*range(n)])])[0]).sum()) for k, p in PRUNERS.items()}
    assert removed["local"] == row["local_pruned"]
    exact = Fraction(str(amount)) * n
    # the public global pruner rounds 7.000000000000001 up to 8: not copied
    overcounts = exact.denominator == 1 and row["global_pruned"] != exact
    assert removed["global"] == (int(exact) if overcounts else row["global_pruned"])
    assert overcounts == ((n, amount) in ((100, 0.07), (100, 0.55)))


@pytest.mark.parametrize("row", FACTS["ties_all_equal"], ids=lambda r: str(r["n"]))
def test_ties_go_by_index(row):
    n = row["n"]
    for kind, pruner in PRUNERS.items():
        mask = row_masks(pruner(row["amount"]), [one_layer([1.0] * n)])[0]
        assert int(mask.sum()) == sum(row[f"{kind}_keep"])
        assert mask[: int(mask.sum())].all()


def test_layers_of_zeros_do_not_fail():
    """The public code ends with an assertion here, also for scorers that never read the zeros."""
    zeros = Layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2), torch.zeros(2))
    for scorer in SCORERS.values():
        assert torch.isfinite(shares_of(scorer.apply(zeros.in_activation, zeros))).all()
    assert shares_of(NormScorer(1).apply(zeros.in_activation, zeros)).tolist() == pytest.approx([0.3, 0.7])
    assert SCORERS["activation"].apply(zeros.in_activation, zeros).tolist() == [0, 0]


def test_the_default_has_a_graph():
    """With gamma = 0, the public default, scores are those of the activation; ours change with what is upstream."""
    layer = layers_of("two_layer")[0]
    for p in ([3.0, 1.0], [1.0, 3.0]):
        off = WeightedPageRankScorer(gamma=0.0).apply(torch.tensor(p), layer)
        assert off.tolist() == pytest.approx(shares_of(layer.out_activation).tolist())
    a, b = (WeightedPageRankScorer().apply(torch.tensor(p), layer) for p in ([3.0, 1.0], [1.0, 3.0]))
    assert not torch.allclose(a, b)
