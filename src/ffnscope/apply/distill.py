"""Train what stays of one FFN towards the output that is wanted of it, on its own inputs. Tensors only: no model.

Least squares of down cannot change the channels; here gate, up, down and biases of the kept channels are trained
together, token by token, on the same inputs and targets: without labels, and without a backward pass through a model.
ZeroQuant (arXiv:2206.01861) distils one layer at a time for quantisation, on the inputs of the dense model; here the
inputs are those of the pruned model, and the unit is an FFN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ffnscope.apply.block_fit import SiteSums
from ffnscope.apply.ffn_tokens import FIELDS, FFNTokens, mapped, widened
from ffnscope.apply.refit import LeastSquares, Moments, choose_damping, refit_down
from ffnscope.errors import UsageError
from ffnscope.ffn.function import FFN, Activation
from ffnscope.types import FFNWeights

BETAS = (0.9, 0.98)
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Of the last refit: the strong ones hardly move columns that are trained already."""
OnEpoch = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Distillation:
    """How FFNs are trained.

    Attributes:
        epochs: passes over the tokens of an FFN, at most.
        learning_rate: of Adam, at its highest.
        batch_tokens: tokens per step.
        weight_decay: decoupled pull towards the weights at the start, not towards zero.
        warmup: share of the steps in which the rate rises; then it falls to 0 along a cosine.
        patience: epochs without a lower held-out error after which the training of an FFN ends.
        seed: of the order of the tokens.
    """

    epochs: int = 8
    learning_rate: float = 3e-4
    batch_tokens: int = 512
    weight_decay: float = 0.0
    warmup: float = 0.1
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_tokens", "patience"):
            if getattr(self, name) < 1:
                raise UsageError(f"distillation: {name} must be at least 1; got {getattr(self, name)}.")
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"distillation: learning_rate must be positive; got {self.learning_rate}.")
        if not 0 <= self.weight_decay < float("inf") or not 0 <= self.warmup <= 1:
            raise UsageError(
                "distillation: weight_decay must be 0 or more, warmup in [0, 1]; "
                f"got {self.weight_decay} and {self.warmup}."
            )

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0."""
        rising = max(1, round(self.warmup * steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        return self.learning_rate * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2


def distill(
    tokens: FFNTokens,
    weights: FFNWeights,
    activation: Activation,
    options: Distillation,
    *,
    damping: float,
    error_weights: Tensor | None = None,
    on_epoch: OnEpoch | None = None,
) -> tuple[FFNWeights | None, dict[str, Any]]:
    """Train the kept channels, keep the epoch with the lowest held-out error, and refit down once more.

    Minimises the mean over tokens of e^T G e, e = t - W' h'(x) - b'. The start is the better of the given columns of
    down and their least squares on the tokens to fit. The last refit is a least squares with the trained channels,
    pulled towards the trained columns, with the damping that is best on held-out tokens; where it lowers the held-out
    error it is made on all tokens.

    Memory beside the arguments: six times the weights in float32, and one batch of activations.

    Args:
        tokens: inputs and wanted outputs (after `FFNTokens.aim`), with held-out ones.
        weights: of the k kept channels, as they are. ``down_bias`` is what is added to the bias of down: 0 where it can
            be trained, None where down has no bias.
        activation: between gate (or up) and h.
        options: see `Distillation`.
        damping: of the least squares at the start.
        error_weights: G [d_model, d_model], symmetric and positive semi-definite; None for the identity.
        on_epoch: called with (epochs done, epochs in all).

    Returns:
        The trained weights in the dtype of ``weights``, or None where no epoch lowered the held-out error; and facts:
        ``epochs`` that were kept, ``error_start``, ``error_trained``, ``error_refit`` on held-out tokens (of e^T G e),
        ``error``, the mean of ||e||^2 there with the result, ``refit``, and ``epochs_run``.

    Raises:
        UsageError: no held-out tokens, or none to fit.
    """
    if not 0 < tokens.n_fit < tokens.n:
        raise UsageError(f"distillation needs tokens to fit and held-out ones; got {tokens.n_fit} of {tokens.n}.")
    given = widened(weights)
    metric = None if error_weights is None else error_weights.to(given.up)
    with torch.inference_mode(False), torch.no_grad():
        fitted = replace(given, down=_refitted(given, _moments(tokens, given, activation)[0], damping))
        errors = [held_out_error(tokens, one, activation, metric) for one in (fitted, given)]
        start = fitted if errors[0] <= errors[1] else given
        best, epoch, run = _trained(tokens, start, activation, options, metric, on_epoch)
        facts: dict[str, Any] = {"epochs": epoch, "epochs_run": run, "error_start": min(errors)}
        found = _finished(tokens, _stored(best, weights), activation, metric, facts) if epoch else None
        return (None if found is None else _stored(found, weights, wide=False)), facts


def _finished(
    tokens: FFNTokens, best: FFNWeights, activation: Activation, metric: Tensor | None, facts: dict[str, Any]
) -> FFNWeights | None:
    """The last refit where it helps; None where all was lost in rounding. Adds to the facts."""
    fit, held = _moments(tokens, best, activation)
    problem, judge = (LeastSquares.of(best.down, _every(best), sums) for sums in (fit, held))
    damping, _ = choose_damping(problem, judge, DAMPINGS)
    again = replace(best, down=problem.solved(damping).to(best.down))
    trained, refit = (held_out_error(tokens, one, activation, metric) for one in (best, again))
    facts |= {"error_trained": trained, "error_refit": refit, "refit": refit < trained}
    if not min(trained, refit) < facts["error_start"]:
        return None
    facts["error"] = held_out_error(tokens, again if refit < trained else best, activation, None)
    return replace(best, down=_refitted(best, fit + held, damping)) if refit < trained else best


def _stored(weights: FFNWeights, like: FFNWeights, *, wide: bool = True) -> FFNWeights:
    """Rounded to the dtype of other weights; ``wide``: and back in that of the computation."""
    rounded = mapped(weights, lambda value: value.to(like.up.dtype))
    return widened(rounded) if wide else rounded


def held_out_error(
    tokens: FFNTokens, weights: FFNWeights, activation: Activation, error_weights: Tensor | None
) -> float:
    """Mean over held-out tokens of e^T G e, e = t - W' h'(x) - b'."""
    total = 0.0
    for x, wanted in tokens.pieces(held_out=True):
        total += float(_errors(x, wanted, weights, activation, error_weights).double().sum())
    return total / (tokens.n - tokens.n_fit)


def _errors(
    x: Tensor, wanted: Tensor, weights: FFNWeights, activation: Activation, error_weights: Tensor | None
) -> Tensor:
    """e^T G e per token, [n]."""
    left = wanted - torch.nn.functional.linear(FFN(weights, activation).h(x), weights.down, weights.down_bias)
    return _power(left, error_weights)


def _power(left: Tensor, error_weights: Tensor | None) -> Tensor:
    return (left * (left if error_weights is None else left @ error_weights)).sum(1)


def _trained(
    tokens: FFNTokens,
    start: FFNWeights,
    activation: Activation,
    options: Distillation,
    metric: Tensor | None,
    on_epoch: OnEpoch | None,
) -> tuple[FFNWeights, int, int]:
    """The weights after the best epoch, which that is (0 = none is better than the start), and how many were run."""
    live = mapped(start, lambda value: value.clone().requires_grad_())
    parts, anchors = _tensors(live), _tensors(start)
    adam = torch.optim.Adam(parts, lr=options.learning_rate, betas=BETAS)
    order = torch.Generator().manual_seed(options.seed)
    scale = _scale(tokens, metric)
    steps, step = options.epochs * math.ceil(tokens.n_fit / options.batch_tokens), 0
    best, best_error, best_epoch, epoch = start, held_out_error(tokens, start, activation, metric), 0, 0
    for epoch in range(1, options.epochs + 1):
        for index in torch.randperm(tokens.n_fit, generator=order).split(options.batch_tokens):
            rate = adam.param_groups[0]["lr"] = options.rate(step, steps)
            with torch.enable_grad():
                loss = _errors(*tokens.rows(index), live, activation, metric).mean() / scale
                adam.zero_grad()
                loss.backward()
            adam.step()
            _pull(parts, anchors, rate * options.weight_decay)
            step += 1
        error = held_out_error(tokens, live, activation, metric)
        if on_epoch is not None:
            on_epoch(epoch, options.epochs)
        if error < best_error:  # never for NaN
            best, best_error, best_epoch = mapped(live, lambda v: v.detach().clone()), error, epoch
        elif epoch - best_epoch >= options.patience:
            break
    return best, best_epoch, epoch


def _pull(parts: Sequence[Tensor], anchors: Sequence[Tensor], share: float) -> None:
    for part, anchor in zip(parts, anchors, strict=True) if share else ():
        part.lerp_(anchor, share)


def _scale(tokens: FFNTokens, metric: Tensor | None) -> float:
    """Mean power of what is wanted of the tokens to fit."""
    total = sum(float(_power(wanted, metric).double().sum()) for _, wanted in tokens.pieces(held_out=False))
    return total / tokens.n_fit or 1.0


def _refitted(weights: FFNWeights, sums: Moments, damping: float) -> Tensor:
    """Least squares of down, pulled towards its columns."""
    return refit_down(weights.down, _every(weights), sums, damping).to(weights.down)


def _moments(tokens: FFNTokens, weights: FFNWeights, activation: Activation) -> tuple[Moments, Moments]:
    """Sums over the tokens to fit, and over those held out, of the channels and of what they leave."""
    sums = SiteSums.empty()
    for place, held_out in ((sums.fit, False), (sums.held_out, True)):
        for x, wanted in tokens.pieces(held_out=held_out):
            h = FFN(weights, activation).h(x)
            place.add(h, wanted - torch.nn.functional.linear(h, weights.down, weights.down_bias))
    assert sums.fit.moments is not None and sums.held_out.moments is not None, "there are both"
    return sums.fit.moments, sums.held_out.moments


def _every(weights: FFNWeights) -> Tensor:
    return torch.arange(len(weights.up), device=weights.up.device)


def _tensors(weights: FFNWeights) -> list[Tensor]:
    return [value for name in FIELDS if (value := getattr(weights, name)) is not None]
