"""Predictors from their files: made without calibration tokens, since the tensors of the file hold what these gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ffnscope.errors import ArtifactError, UsageError
from ffnscope.ffn.function import FFN
from ffnscope.registry import PREDICTORS
from ffnscope.sparse.predictors.fixed import Constant
from ffnscope.sparse.predictors.interface import Predictor
from ffnscope.sparse.predictors.low_rank import LowRank
from ffnscope.sparse.predictors.whitened_svd import LowRankMatrix, WhitenedSVD

Params = Mapping[str, Any]
Empty = Callable[[FFN, Params, Mapping[str, Tensor]], Predictor]
"""FFN, parameters of the factory and tensors -> a predictor with tensors of the same shapes."""


def restore_predictor(name: str, ffn: FFN, params: Params, state: Mapping[str, Tensor]) -> Predictor:
    """The predictor that a factory made with these parameters and some tokens, from its `state_dict`.

    A predictor of another package is made by its factory without tokens, and then given its tensors.

    Args:
        name: of the predictor.
        ffn: that it is about.
        params: of its factory.
        state: its tensors; used as they are, on the device of the FFN.

    Raises:
        ArtifactError: tensors of another predictor or FFN.
        UsageError: a factory that makes nothing without tokens.
    """
    device = ffn.weights.up.device
    make = _EMPTY.get(name, lambda ffn, params, state: _by_factory(name, ffn, params))
    made = make(ffn, params, state)
    expected = {key: tuple(value.shape) for key, value in made.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if expected != found:
        raise ArtifactError(f"the tensors of predictor {name!r} for {ffn.name} are {found}; expected {expected}.")
    made.load_state_dict({key: value.to(device) for key, value in state.items()}, assign=True)
    return made.eval().requires_grad_(False)


def _by_factory(name: str, ffn: FFN, params: Params) -> Predictor:
    try:
        return PREDICTORS.get(name).make(ffn, None, **params)
    except UsageError as error:
        raise UsageError(
            f"predictor {name!r} cannot be made again from a file, since its factory needs tokens ({error}) Let it "
            "make a predictor with empty tensors when fit is None."
        ) from error


def _whitened_svd(ffn: FFN, params: Params, state: Mapping[str, Tensor]) -> Predictor:
    rank = state["gate.inner"].shape[0] if "gate.inner" in state else 1

    def empty() -> LowRankMatrix:
        return LowRankMatrix(torch.empty(ffn.d_ff, rank), torch.empty(rank, ffn.d_model))

    return WhitenedSVD(ffn, empty(), empty() if "up.inner" in state else None, torch.empty(ffn.d_ff))


def _low_rank(ffn: FFN, params: Params, state: Mapping[str, Tensor]) -> Predictor:
    rank = state["fc1.weight"].shape[0] if "fc1.weight" in state else 1
    lookahead, bias = params.get("lookahead", 0), "fc2.bias" in state
    return LowRank(ffn, rank, relu=params.get("relu", True), lookahead=lookahead, bias=bias)


def _static(ffn: FFN, params: Params, state: Mapping[str, Tensor]) -> Predictor:
    return Constant(ffn, torch.empty(ffn.d_ff))


def _without(name: str, factor: str) -> Empty:
    """A factory that needs tokens only for a factor of its weight, which the file has."""
    return lambda ffn, params, state: PREDICTORS.get(name).make(ffn, None, **{**params, factor: False})


_EMPTY: dict[str, Empty] = {
    "exact_gate": _without("exact_gate", "up_size"),
    "exact_up": _without("exact_up", "gate_size"),
    "static": _static,
    "whitened_svd": _whitened_svd,
    "low_rank": _low_rank,
    "deja_vu": lambda ffn, params, state: _low_rank(ffn, {**params, "relu": False}, state),
    "fc_files": _low_rank,
}
