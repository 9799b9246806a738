"""Every registered predictor keeps the laws of predictors: a new one is tested by being registered."""

from __future__ import annotations

import pytest
import torch

from ffnscope.registry import PREDICTORS
from ffnscope.testing import check_predictor
from ffnscope.testing.predictors import D_FF, D_MODEL

PARAMS = {"whitened_svd": {"rank": 8}, "low_rank": {"rank": 8, "epochs": 2}, "deja_vu": {"rank": 8, "epochs": 2}}


@pytest.mark.parametrize("name", [name for name in PREDICTORS.names() if name != "fc_files"])
def test_predictor_keeps_the_laws(name):
    check_predictor(name, **PARAMS.get(name, {}))


def test_predictors_from_files_keep_the_laws(tmp_path):
    random = torch.Generator().manual_seed(0)
    fc1, fc2 = torch.randn(4, D_MODEL, generator=random), torch.randn(D_FF, 4, generator=random)
    torch.save({"fc1.weight": fc1, "fc2.weight": fc2}, tmp_path / "model_3.pt")
    check_predictor("fc_files", folder=str(tmp_path), layer=3, before_norm=False)
    check_predictor("fc_files", folder=str(tmp_path), layer=3, norm=torch.full((D_MODEL,), 0.5))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("oracle", {"norm": False}),
        ("exact_gate", {"up_size": False, "norm": False}),
        ("exact_up", {"gate_size": False}),
        ("low_bit", {"bits": 3, "group": 5}),
        ("whitened_svd", {"rank": 5, "up": False}),
        ("static", {"kept": torch.tensor([2, 5])}),
    ],
)
def test_with_other_parameters(name, params):
    check_predictor(name, **params)


@pytest.mark.parametrize("name", PREDICTORS.names())
def test_predictor_is_documented(name):
    assert PREDICTORS.get(name).summary
