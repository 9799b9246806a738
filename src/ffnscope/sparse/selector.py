"""A predictor, a policy and its parameter: the selection of one FFN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ffnscope.sparse.policies import Policy
from ffnscope.sparse.predictors.interface import Predictor


@dataclass(frozen=True, slots=True, eq=False)
class Selector:
    """Which channels of an FFN a token needs: ``selector(x [T, d_model]) -> mask [T, d_ff]``, True = keep.

    Attributes:
        predictor: gives scores.
        policy: selects by them.
        parameter: of the policy, as `calibrate_policy` finds it.
    """

    predictor: Predictor
    policy: Policy
    parameter: float

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Inputs [T, d_model] -> mask [T, d_ff]."""
        return self.policy.select(self.predictor(x), self.parameter)
