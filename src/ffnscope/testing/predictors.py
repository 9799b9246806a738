"""The laws of a predictor, checked on synthetic FFNs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffnscope.errors import ContractError, UsageError
from ffnscope.ffn.function import FFN
from ffnscope.registry import PREDICTORS
from ffnscope.rules import Factory
from ffnscope.sparse.predictors.interface import FitTokens, Predictor
from ffnscope.types import FFNWeights

D_MODEL, D_FF, TOKENS = 16, 40, 96


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    """A predictor to be made, an FFN to make it for, and tokens."""

    rule: Factory
    ffn: FFN
    fit: FitTokens
    x: Tensor
    params: dict[str, Any]

    def make(self, ffn: FFN | None = None) -> Predictor:
        found = self.rule.make(ffn or self.ffn, self.fit, **self.params)
        if not isinstance(found, Predictor):
            raise _broken(self.rule, "type", f"it returned {type(found).__name__}; expected a Predictor")
        return found


def check_predictor(predictor: str | Factory, **params: Any) -> None:
    """Check that a predictor keeps the laws of its kind; silent when it does.

    The laws: scores are floating [T, d_ff], finite and not negative; those of a token do not depend on the others of
    its batch; weights, inputs and the global random state are not changed; the same arguments give the same scores;
    another order of the channels gives the scores in that order, unless it has a ``seed``; a ``state_dict`` that is
    loaded into another one of the same FFN gives the same scores; ``bytes_read`` is a whole number of at least 0, and
    ``reads`` names only gate and up; gated and plain FFNs, bfloat16 and float64 weights work. One that raises
    UsageError for plain FFNs is taken to be for gated ones alone.

    Args:
        predictor: a registered name, or an unregistered `Factory`.
        **params: parameters of the predictor, for an FFN of 16 inputs and 40 channels.

    Raises:
        ContractError: a law is broken; the message names it.
        UnknownNameError: no predictor of that name.
    """
    rule = PREDICTORS.get(predictor) if isinstance(predictor, str) else predictor
    for gated in (True, False):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            case = _case(rule, params, gated, dtype)
            try:
                made = case.make()
            except UsageError as error:
                if gated:
                    raise _broken(rule, "gated FFNs", f"it raised: {error}") from error
                continue
            _check_scores(case, made)
            if dtype == torch.float64:
                _check_repeat(case, made)
                _check_state(case, made)
                _check_order(case, made)


def _case(rule: Factory, params: dict[str, Any], gated: bool, dtype: torch.dtype) -> _Case:
    random = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=random, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype)

    gate, up, down = draw(D_FF, D_MODEL), draw(D_FF, D_MODEL), draw(D_MODEL, D_FF)
    biases = [draw(1, n)[0] for n in (D_FF, D_FF, D_MODEL)]
    weights = FFNWeights(gate if gated else None, up, down, biases[0] if gated else None, biases[1], biases[2])
    x, document = draw(TOKENS, D_MODEL) * 4, torch.arange(TOKENS) // 12
    fit = FitTokens(x, document, (x.double() + 0.1).to(dtype))
    return _Case(rule, FFN(weights, nn.functional.silu), fit, draw(17, D_MODEL) * 4, params)


def _check_scores(case: _Case, made: Predictor) -> None:
    rule, x, state = case.rule, case.x.clone(), torch.get_rng_state()
    weights = [t for t in (case.ffn.weights.gate, case.ffn.weights.up, case.ffn.weights.down) if t is not None]
    before = [t.clone() for t in weights]
    with torch.no_grad():
        scores = made(x)
        parts = torch.cat([made(part) for part in x.split(5)])
    if not isinstance(scores, Tensor) or scores.shape != (len(x), D_FF) or not scores.is_floating_point():
        found = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise _broken(rule, "shape", f"it returned {found}; expected floating ({len(x)}, {D_FF}) = (T, d_ff)")
    if not bool(torch.isfinite(scores).all()) or bool((scores < 0).any()):
        raise _broken(rule, "finite scores", "a score is negative, NaN or infinite")
    if not torch.equal(x, case.x) or not all(torch.equal(a, b) for a, b in zip(weights, before, strict=True)):
        raise _broken(rule, "purity", "it changed its inputs or the weights; work on a copy")
    if not torch.equal(state, torch.get_rng_state()):
        raise _broken(rule, "purity", "it changed the global random state; draw from a torch.Generator of its own")
    if not _near(parts, scores):
        raise _broken(rule, "tokens alone", "the same tokens in smaller batches got other scores")
    if type(made.bytes_read) is not int or made.bytes_read < 0 or not made.reads <= {"gate", "up"}:
        what = f"bytes_read is {made.bytes_read!r} and reads {set(made.reads)}"
        raise _broken(rule, "cost", f"{what}; expected a whole number of at least 0, and some of gate and up")


def _check_repeat(case: _Case, made: Predictor) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        again = case.make()(case.x)
    with torch.no_grad():
        if not torch.equal(again, made(case.x)):
            raise _broken(case.rule, "determinism", "two predictors made with the same arguments gave other scores")


def _check_state(case: _Case, made: Predictor) -> None:
    other, state = case.make(), made.state_dict()
    with torch.no_grad():
        for value in other.state_dict().values():
            value.zero_()
        other(case.x)
        other.load_state_dict(state)
        if not torch.equal(other(case.x), made(case.x)):
            raise _broken(case.rule, "state", "its state_dict, loaded into another one, gave other scores")


def _check_order(case: _Case, made: Predictor) -> None:
    if "seed" in case.rule.params:
        return
    order = torch.randperm(D_FF, generator=torch.Generator().manual_seed(5))
    if {"kept", "plan", "folder"} & set(case.params):  # these name channels by their places
        return
    weights = case.ffn.weights
    moved = FFNWeights(
        None if weights.gate is None else weights.gate[order],
        weights.up[order],
        weights.down[:, order],
        None if weights.gate_bias is None else weights.gate_bias[order],
        None if weights.up_bias is None else weights.up_bias[order],
        weights.down_bias,
    )
    with torch.no_grad():
        if not _near(case.make(FFN(moved, case.ffn.act))(case.x), made(case.x)[:, order]):
            raise _broken(case.rule, "order of channels", "channels in another order got other scores")


def _near(found: Tensor, expected: Tensor) -> bool:
    """Within a thousandth of the largest value."""
    scale = float(expected.abs().max())
    return torch.allclose(found.double(), expected.double(), rtol=1e-3, atol=1e-3 * scale)


def _broken(rule: Factory, law: str, what: str) -> ContractError:
    return ContractError(f"predictor {rule.name!r} breaks the law of {law}: {what.rstrip('.')}.")
