"""Every registered predictor keeps the laws of predictors: a new one is tested by being registered."""

from __future__ import annotations

import pytest
import torch

from ffnscope.registry import PREDICTORS
from ffnscope.testing import check_predictor

PARAMS = {"whitened_svd": {"rank": 8}, "low_rank": {"rank": 8, "epochs": 2}, "deja_vu": {"rank": 8, "epochs": 2}}


@pytest.mark.parametrize("name", PREDICTORS.names())
def test_predictor_keeps_the_laws(name):
    check_predictor(name, **PARAMS.get(name, {}))


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
